"""Kill training runs at random moments and compare their curves with an uninterrupted run's.

    python benchmarks/kills.py --kills 100 --seconds 1200 --out runs/kills

Each round takes one of five runs (one process, DDP and FSDP2 on two, each with and without worker
processes for the data), kills it with SIGKILL, and gives the command again until it ends. Moments
are a random number of log lines and a random delay after them, so that some fall into a save, a
rename or the writing of the log. A run is divergent where a line of its log differs from that of
the uninterrupted run. Prints a line for each run and a table last.
"""

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.train.tiny import curve, fields, start_ranks, write_texts

STEPS = 40
FORMS = {
    "one process": (1, ()),
    "one process, a worker": (1, ("data.workers=1",)),
    "DDP on 2": (2, ()),
    "FSDP2 on 2": (2, ("parallel.shard=2",)),
    "FSDP2 on 2, saves at every step": (2, ("parallel.shard=2", "train.checkpoint_every=1")),
}
HANG = 600.0  # seconds; a slow machine needs a tenth


def finish(processes: list, until: float) -> bool:
    """Whether all processes end by themselves."""
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    return not any(process.is_alive() for process in processes)


def kill_all(processes: list) -> None:
    """SIGKILL to every process."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def one_run(recipe: Path, out: Path, form: str, random: Random) -> tuple[int, bool, bool]:
    """(kills, whether the run ended with exit code 0, whether one of its kills met a save)."""
    world, options = FORMS[form]
    kills, in_save = 0, False
    for _ in range(random.randint(3, 6)):
        processes = start_ranks(recipe, out, world, *options)
        log = out / "log.jsonl"
        after = random.randint(1, 12) + (log.read_bytes().count(b"\n") if log.exists() else 0)
        until = time.monotonic() + HANG
        while all(p.is_alive() for p in processes) and time.monotonic() < until:
            if log.exists() and log.read_bytes().count(b"\n") >= after:
                break
            time.sleep(0.001)
        time.sleep(random.random() * 0.05)
        if all(p.is_alive() for p in processes):
            # torchrun ends the others when one is killed; here one is killed, or all at once.
            victims = processes if random.random() < 0.5 else [random.choice(processes)]
            kill_all(victims)
            kills += 1
            in_save = in_save or bool(list(out.glob("checkpoints/.writing-*")))
        kill_all(processes)
    processes = start_ranks(recipe, out, world, *options)
    ended = finish(processes, time.monotonic() + HANG)
    kill_all(processes)
    return kills, ended and all(p.exitcode == 0 for p in processes), in_save


def main() -> None:
    """Kill until the number or the time is reached."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/kills"))
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    corpus = write_texts(args.out / "texts")
    plain = fields(corpus, steps=STEPS, checkpoint_every=3, validate_every=5, rows=1)
    recipe = args.out / "recipe.yaml"
    recipe.write_text(json.dumps(plain))
    random, began = Random(args.seed), time.monotonic()
    expected: dict[str, list] = {}
    kills, divergent, saves = Counter(), Counter(), 0
    for number in range(10**6):
        if sum(kills.values()) >= args.kills or time.monotonic() - began > args.seconds:
            break
        form = list(FORMS)[number % len(FORMS)]
        world, options = FORMS[form]
        if form not in expected:  # forms differ in the order of their sums
            whole = args.out / f"whole-{len(expected)}"
            processes = start_ranks(recipe, whole, world, *options)
            assert finish(processes, time.monotonic() + HANG), form
            expected[form] = curve(whole)
        out = args.out / f"run-{number}"
        killed, ended, in_save = one_run(recipe, out, form, random)
        same = ended and curve(out) == expected[form]
        kills[form] += killed
        divergent[form] += not same
        saves += in_save
        print(f"{form}: {killed} kills, {'equal' if same else f'DIVERGENT, see {out}'}", flush=True)
        if same:
            shutil.rmtree(out)
    for form in FORMS:
        print(f"{form:34} {kills[form]:4} kills, {divergent[form]} divergent")
    print(f"{sum(kills.values())} kills, {saves} runs with one in a save, "
          f"{sum(divergent.values())} divergent")  # fmt: skip


if __name__ == "__main__":
    main()
