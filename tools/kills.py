"""Kill training runs, resume them, and compare model and log with an uninterrupted run's.

    make kills ARGS="--kills 100 --out runs/kills"

Runs take turns: one process, DDP on two and FSDP2 on two. A run is killed with SIGKILL three to
five times, two of three at a chosen moment (see killpoints.py), else at a random one (a number
of log lines, then a random delay). After each kill the command is given again. Of several processes
one is killed; the others are killed with it, or told to stop as torchrun does. A run is divergent
where a file of its model or a line of its log (without timings) differs in a bit from that of the
uninterrupted run, or where it does not end. Prints a line a run and a table; exits with 1 if a run
is divergent.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from multiprocessing.connection import wait
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
for threads in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(threads, "1")  # processes that wait for each other's threads take long

from osdn.system.files import sha256  # noqa: E402
from tests.train.tiny import curve, fields, start_ranks, write_texts  # noqa: E402
from tools.killpoints import MOMENTS  # noqa: E402

STEPS = 14
FORMS = {
    "one process": (1, ()),
    "DDP on 2": (2, ()),
    "FSDP2 on 2": (2, ("parallel.shard=2",)),
}
RANDOM = "a random one"
SAVE = ("leftovers", "tensors", "notes", "rename", "renamed", "removal")  # within a save
HANG = 3600.0  # seconds after which a run counts as hanging; a busy machine needs a hundredth
PATIENCE = 10.0  # seconds that torchrun's place gives others to stop, before it kills them


class Kill(NamedTuple):
    """A kill that took place: the form and moment, the process, and whether a save was on."""

    form: str
    moment: str
    rank: int
    saving: bool


class Run:
    """One training run that is killed and given again."""

    def __init__(self, recipe: Path, out: Path, form: str, random: Random) -> None:
        self.recipe, self.out, self.form, self.random = recipe, out, form, random
        self.world, self.options = FORMS[form]

    def start(self, rank: int = 0, code: str = "") -> list[Any]:
        """Its processes; `code` runs in one of them first."""
        quiet = "sys.stdout = open(os.devnull, 'w')\n"
        codes = {one: quiet + (code if one == rank else "") for one in range(self.world)}
        return start_ranks(self.recipe, self.out, self.world, *self.options, rank_code=codes)

    def choose(self, counts: Counter[str]) -> str:
        """The moment that was killed at least often, of those that can come now."""
        moments = [
            moment
            for moment in MOMENTS
            if (moment != "leftovers" or self.unfinished())
            and (moment != "cut" or (self.out / "log.jsonl").exists())
        ]
        self.random.shuffle(moments)
        return min(moments, key=lambda moment: counts[moment])

    def unfinished(self) -> bool:
        """Whether a checkpoint lies half written."""
        return bool(list(self.out.glob("checkpoints/.writing-*")))

    def finish(self) -> bool:
        """Give it again; whether it ends by itself, and well."""
        processes = self.start()
        until = time.monotonic() + HANG
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
        ended = [process.exitcode for process in processes]
        kill(processes)
        return ended == [0] * self.world

    def kill_at(self, moment: str) -> Kill | None:
        """Give it again and kill it at a moment; None if it does not come to that moment."""
        # Only rank 0 does more than write its share of the tensors.
        rank = self.random.randrange(self.world) if moment == "tensors" else 0
        most = {"log": 8, "notes": 12, "removal": 6, "export": 12, "cut": 1, "leftovers": 2}
        number = self.random.randint(1, most.get(moment, 3))
        code = f"from tools.killpoints import arm; arm({str(self.out)!r}, {moment!r}, {number})"
        processes = self.start(rank, code)
        wait([process.sentinel for process in processes], HANG)
        processes[rank].join(PATIENCE)  # another may hear of it before this one is reaped
        return self.settle(processes, rank, moment)

    def kill_at_random(self) -> Kill | None:
        """Give it again and kill it anywhere; None if it ends before."""
        processes = self.start()
        log, rank = self.out / "log.jsonl", self.random.randrange(self.world)
        lines = log.read_bytes().count(b"\n") if log.exists() else 0
        after = lines + self.random.randint(0, 6)
        until = time.monotonic() + HANG
        while all(process.is_alive() for process in processes) and time.monotonic() < until:
            if log.exists() and log.read_bytes().count(b"\n") >= after:
                break
            time.sleep(0.001)
        time.sleep(self.random.random() * 0.05)
        processes[rank].kill()
        processes[rank].join()
        return self.settle(processes, rank, RANDOM)

    def settle(self, processes: list[Any], rank: int, moment: str) -> Kill | None:
        """The others end too; what was killed, if it was."""
        killed = processes[rank].exitcode == -signal.SIGKILL
        if self.random.random() < 0.5:
            for process in processes:
                process.terminate()
            until = time.monotonic() + PATIENCE
            for process in processes:
                process.join(max(0.0, until - time.monotonic()))
        kill(processes)
        return Kill(self.form, moment, rank, self.unfinished()) if killed else None


def kill(processes: list[Any]) -> None:
    """SIGKILL to those that still run."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def left_by(out: Path) -> dict[str, Any]:
    """What must repeat in every bit: the log without its timings, the model's files."""
    model = {path.name: sha256(path) for path in sorted((out / "model").glob("*"))}
    leftovers = sorted(path.name for path in out.rglob(".writing-*"))
    steps = sorted(path.name for path in (out / "checkpoints").iterdir())
    return {"log": curve(out), "model": model, "checkpoints": steps, "leftovers": leftovers}


def moments_of(recipe: Path, out: Path, form: str) -> Counter[str]:
    """Train without interruption; how often each kind of moment was met in rank 0."""
    run, record = Run(recipe, out, form, Random(0)), out.with_suffix(".moments")
    code = f"from tools.killpoints import arm; arm({str(out)!r}, '', 0, {str(record)!r})"
    processes = run.start(0, code)
    for process in processes:
        process.join(HANG)
    if [process.exitcode for process in processes] != [0] * run.world:
        raise SystemExit(f"{form}: the uninterrupted run failed, see {out.parent}/*.err")
    return Counter(record.read_text().split())


def campaign(
    out: Path, kills: int, seed: int, forms: tuple[str, ...] = tuple(FORMS)
) -> tuple[list[Kill], list[Path]]:
    """Kill until the number is reached, and every form was killed; the kills, and the directories
    of divergent runs."""
    shutil.rmtree(out, ignore_errors=True)
    corpus = write_texts(out / "texts")
    plain = fields(corpus, steps=STEPS, checkpoint_every=2, validate_every=5)
    recipe = out / "recipe.yaml"
    recipe.write_text(json.dumps(plain))
    random = Random(seed)
    expected: dict[str, dict[str, Any]] = {}
    done: list[Kill] = []
    divergent: list[Path] = []
    counts: dict[str, Counter[str]] = {form: Counter() for form in forms}
    for number in range(100 * kills):
        if len(done) >= kills and {kill.form for kill in done} == set(forms):
            break
        form = forms[number % len(forms)]
        if form not in expected:  # forms differ in the order of their sums
            whole = out / f"whole-{number}"
            met = moments_of(recipe, whole, form)
            expected[form] = left_by(whole)
            print(f"{form}: met {dict(met)}", flush=True)
        run = Run(recipe, out / f"run-{number}", form, random)
        mine: list[Kill] = []
        for turn in range(random.randint(3, 5)):
            if (run.out / "model").exists():
                break
            moment = RANDOM if turn % 3 == 2 else run.choose(counts[form])
            one = run.kill_at_random() if moment == RANDOM else run.kill_at(moment)
            counts[form][moment] += 1
            if one is not None:
                mine.append(one)
        done += mine
        same = run.finish() and left_by(run.out) == expected[form]
        names = ", ".join(f"{kill.moment}{'*' * kill.saving}" for kill in mine)
        result = "equal" if same else f"DIVERGENT, see {run.out}"
        print(f"{len(done):4} {form}: {names or 'no kill'}: {result}", flush=True)
        if same:
            shutil.rmtree(run.out)
        else:
            divergent.append(run.out)
    return done, divergent


def main() -> int:
    """Kill, compare, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/kills"))
    args = parser.parse_args()
    done, divergent = campaign(args.out.resolve(), args.kills, args.seed)
    counts = Counter((kill.moment, kill.form) for kill in done)
    print(f"\n| killed when | {' | '.join(FORMS)} |\n|---|{'---|' * len(FORMS)}")
    for moment, words in {**MOMENTS, RANDOM: "at a random moment"}.items():
        print(f"| {words} | {' | '.join(str(counts[moment, form]) for form in FORMS)} |")
    half = sum(kill.saving for kill in done)
    within = sum(kill.saving or kill.moment in SAVE for kill in done)
    print(
        f"\n{len(done)} kills, {within} within a save, {half} of them with a checkpoint half "
        f"written (*); {len(divergent)} divergent runs"
    )
    return 1 if divergent else 0


if __name__ == "__main__":
    sys.exit(main())
