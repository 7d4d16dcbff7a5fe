"""`python -m study run STUDY.yaml`: do what is left of a study, as much as fits, and report it.

Every finished run is a file in OUT/records, named by a hash of what it depends on: a study can be
stopped at any time, done in pieces on any number of machines, and merged; no run is done twice.
"""

import argparse
import math
import os
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import torch
from tqdm import tqdm

from osdn.errors import UserError
from osdn.evals.results import provenance
from osdn.system.signals import sigterm_exits
from osdn.train.setup import make_device
from study.language import check_data, steps_left
from study.plan import Run, Study, all_runs, load_study
from study.records import Clock, Record, Records, append, merge
from study.report import write_report
from study.workers import complete

RESERVE = 5.0  # seconds before the deadline in which the report is written


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The study, the places, and how much to do."""
    parser.add_argument("study", type=Path, help="such as study/recipes/mqar.yaml")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="change a field"
    )
    parser.add_argument("--out", type=Path, help="default: runs/study/ and the study's name")
    parser.add_argument("--list", action="store_true", help="say what is to do and how long")
    parser.add_argument("--minutes", type=float, help="begin only what fits; stop after these")
    parser.add_argument("--only", help="these experiments, separated by commas")
    parser.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        metavar="FROM",
        default=[],
        help="first take over the records of other directories or packed files",
    )
    parser.add_argument(
        "--pack", type=Path, help="also append every record to this one file as it is there"
    )
    parser.add_argument(
        "--processes",
        type=int,
        help="MQAR runs at a time (default: two less than there are cores, at most 14 a GPU; "
        "on a CPU its cores)",
    )
    parser.add_argument(
        "--models", type=int, help="language models at a time (default: one for each GPU)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--work", type=Path, help="of the models (default: OUT/work)")
    parser.epilog = "Fields of a study, and its pieces: docs/howto/repeat-the-study.md"


def run(args: argparse.Namespace) -> None:
    """Merge, list or train; write the report."""
    for name in ("processes", "models"):
        count = getattr(args, name)
        if count is not None and count < 1:
            raise UserError(f"--{name}: expected at least 1, got {count}")
    if args.minutes is not None and not args.minutes > 0:
        raise UserError(f"--minutes: expected a number above 0, got {args.minutes}")
    began = time.monotonic()
    study = load_study(args.study, args.overrides)
    out = args.out or Path("runs/study") / args.study.stem
    records = Records(out)
    if args.merge:
        new, known = merge(records, args.merge)
        print(f"{new} records taken over, {known} were there")
    runs = chosen(study, args.only)
    device = make_device(args.device, "--device").type
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    gpus = torch.cuda.device_count() if device == "cuda" else 1
    processes = args.processes or (max(1, min(14 * gpus, cores - 2)) if device == "cuda" else cores)
    machine = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {cores} cores"
    machine = machine if gpus == 1 else f"{gpus} × {machine}"
    work = args.work or out / "work"
    clock = Clock(
        study,
        records.found.values(),
        machine,
        processes,
        models=args.models or gpus,
        left=lambda run: steps_left(run.spec, work) if run.kind == "language" else run.steps,
    )
    todo = [one for one in runs if one.name not in records.found]
    failed = 0
    print(overview(runs, todo, clock))
    if not args.list:
        check_data(todo, records.found.values())
        limit = math.inf if args.minutes is None else 60 * args.minutes - RESERVE
        session = Session(records, clock, pack=args.pack)
        session.do(todo, limit - (time.monotonic() - began), device, work)
        failed = session.failed
    if records.found:
        page = write_report(study, records, out)
        print(f"{page} and {page.with_suffix('.md')}")
    if failed:
        raise UserError(f"{failed} runs failed, see above; the others are kept")


def chosen(study: Study, names: str | None) -> list[Run]:
    """The runs of the named experiments, in the order of the names; all without names."""
    if names is None:
        return all_runs(study)
    found: dict[str, Run] = {}
    for name in names.split(","):
        if name not in study.mqar and name not in study.language:
            known = ", ".join([*study.mqar, *study.language])
            raise UserError(f"--only: no experiment {name!r}; there are {known}")
        part = Study(
            mqar={k: v for k, v in study.mqar.items() if k == name},
            language={k: v for k, v in study.language.items() if k == name},
        )
        found |= {one.name: one for one in all_runs(part) if one.name not in found}
    return list(found.values())


def overview(runs: list[Run], todo: list[Run], clock: Clock) -> str:
    """A line an experiment: how many runs there are, are left, and how long these take."""
    at_once = f"{clock.processes} MQAR runs at a time, {clock.models} language model"
    lines = [f"{clock.machine}, {at_once}{'s' if clock.models > 1 else ''}"]
    for name in dict.fromkeys(one.experiment for one in runs):
        left = [one for one in todo if one.experiment == name]
        count = sum(one.experiment == name for one in runs)
        sources = Counter(clock.seconds(one)[1] for one in left)
        source = ", ".join(f"{n} {word}" for word, n in sources.items())
        minutes = clock.total(left) / 60
        took = f", {minutes:.1f} min ({source})" if left else ""
        lines.append(f"{name}: {len(left)} of {count} runs left{took}")
    lines.append(f"in all {len(todo)} of {len(runs)} runs, {clock.total(todo) / 60:.1f} min")
    return "\n".join(lines)


class Session:
    """What one call of the command does."""

    def __init__(self, records: Records, clock: Clock, *, pack: Path | None) -> None:
        self.records, self.clock, self.pack = records, clock, pack
        self.failed = 0
        self.origin = provenance()
        if pack is not None:
            append(pack)  # before the first run, that a name that cannot be written to costs none

    def do(self, todo: list[Run], limit: float, device: str, work: Path) -> None:
        """MQAR runs, then language models, as many at a time as the clock says."""
        began = time.monotonic()
        with sigterm_exits(), tqdm(total=len(todo), unit="run", mininterval=1) as bar:
            at_once = {"mqar": self.clock.processes, "language": self.clock.models}
            for kind, processes in at_once.items():
                some = [one for one in todo if one.kind == kind]
                if not some:
                    continue
                finished = complete(
                    some,
                    processes=processes,
                    device=device,
                    work=work,
                    left=lambda: limit - (time.monotonic() - began),
                    seconds=lambda one: self.clock.seconds(one)[0],
                )
                ended = 0
                with closing(finished):  # whatever happens here, the processes are ended
                    for one, outcome, error, seconds in finished:
                        ended += 1
                        if outcome is None:
                            self.failed += 1
                            tqdm.write(f"{one.experiment}, {one.label}, seed {one.seed}: {error}")
                        else:
                            self.keep(one, outcome, seconds)
                            bar.update()
                if not ended:
                    tqdm.write(f"of {len(some)} {kind} runs none fits in the time that is given")

    def keep(self, one: Run, outcome: Record, seconds: float) -> None:
        """Write a finished run down, in both places, before anything else."""
        record = {
            "name": one.name,
            "kind": one.kind,
            "spec": one.spec,
            "outcome": outcome,
            "seconds": round(seconds, 3),
            "machine": self.clock.machine,
            "processes": self.clock.processes,
            **{name: self.origin[name] for name in ("command", "commit", "versions", "time")},
        }
        self.records.add(record)
        if self.pack is not None:
            append(self.pack, record)
        self.clock.learn(record)
