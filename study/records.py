"""What finished runs leave: one JSON file each, named by the run's hash, and how long runs take."""

import json
import lzma
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

from osdn.errors import UserError
from osdn.evals.results import write_json
from osdn.system.outside import LARGEST, Malformed, parse_plain
from study.plan import Run, Study, run_name
from study.schemas import AnyRecord

RECORDS = "records"
Record = dict[str, Any]


def parse_record(text: str | bytes, source: str) -> Record:
    """A record as plain values.

    Raises:
        UserError: not a record, or its name is not its hash.
    """
    record: Record = parse_plain(text, AnyRecord, source)
    if (name := run_name(record["kind"], record["spec"])) != record["name"]:
        raise UserError(f"{source}: run {record['name']} is not what its name says, but {name}")
    return record


class Records:
    """The finished runs in OUT/records, one file each.

    Raises:
        UserError: a damaged record.
    """

    def __init__(self, out: Path) -> None:
        self.directory = out / RECORDS
        self.found: dict[str, Record] = {}
        for path in sorted(self.directory.glob("*.json")):
            try:
                record = parse_record(path.read_bytes(), str(path))
            except (OSError, Malformed) as error:
                reason = error.reason if isinstance(error, Malformed) else error.strerror
                raise UserError(f"{path}: damaged; delete it to run it again ({reason})") from error
            if (name := record["name"]) != path.stem:
                raise UserError(f"{path}: holds the run {name}; delete it, or name it so")
            self.found[name] = record

    def get(self, kind: str, spec: dict[str, Any]) -> Record | None:
        """The record of a run, if it is finished."""
        return self.found.get(run_name(kind, spec))

    def add(self, record: Record) -> bool:
        """Keep a record unless that run is there; whether it was new."""
        if record["name"] in self.found:
            return False
        write_json(self.directory / f"{record['name']}.json", record)
        self.found[record["name"]] = record
        return True


def merge(records: Records, sources: Iterable[Path]) -> tuple[int, int]:
    """Take over the records of other studies' directories or packed files, which may be
    compressed (.xz): (new, known).

    Raises:
        UserError: a source without records, or a damaged one.
    """
    new = known = 0
    for source in sources:
        for record in _read(source):
            if records.add(record):
                new += 1
            else:
                known += 1
    return new, known


def _read(source: Path) -> list[Record]:
    if source.is_dir():
        found = list(Records(source).found.values())
        if not found:
            raise UserError(f"{source}: no {RECORDS}/*.json in it")
        return found
    try:
        with lzma.open(source) if source.suffix == ".xz" else source.open("rb") as file:
            data = file.read(LARGEST + 1)
    except (OSError, EOFError, lzma.LZMAError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{source}: cannot read: {reason}") from error
    if len(data) > LARGEST:  # a compressed file may hold a thousand times its size
        raise UserError(f"{source}: expected at most {LARGEST:,} bytes of records")
    lines = data.split(b"\n")[:-1]  # the last line is empty, or was cut off by a kill
    try:
        return [parse_record(line, f"line {i}") for i, line in enumerate(lines, start=1)]
    except UserError as error:
        raise UserError(
            f"{source}: holds something else than records of a study: {error}"
        ) from error


def append(path: Path, record: Record | None = None) -> None:
    """Add a record to a packed file, one line each, on the disk when this returns.

    A last line that a kill cut off is dropped. Without a record the file is only made.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            if record is not None:
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            file.flush()
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror or error}") from error


def work(spec: dict[str, Any]) -> float:
    """Tokens of a step that an MQAR spec asks for, in thousands."""
    return spec["task"]["length"] * spec["task"]["batch_size"] / 1000


class Clock:
    """Predicts how long runs take from the records of the same machine, or by assumption.

    MQAR: seconds a step of runs alike in all but learning rate, seed and mixer options; else of
    all runs, by tokens a step; else the study's assumption. Language models: seconds a trained step
    of runs with such rows, and their evaluations' seconds; else the experiment's assumption, of the
    share that is left.

    Args:
        processes, models: MQAR runs and language models at a time.
        left: the steps that a run has still to train; by default all.
    """

    def __init__(
        self,
        study: Study,
        records: Iterable[Record],
        machine: str,
        processes: int,
        *,
        models: int = 1,
        left: Callable[[Run], int] = lambda run: run.steps,
    ):
        self.study, self.machine, self.processes, self.models = study, machine, processes, models
        self.left = left
        self.alike: dict[str, list[float]] = {}
        self.evaluations: dict[str, list[float]] = {}
        self.all: list[float] = []
        for record in records:
            self.learn(record)

    def learn(self, record: Record) -> None:
        """Take a finished run into account if it ran on this kind of machine, as many at a time."""
        same = record["machine"] == self.machine and record["processes"] == self.processes
        if record["kind"] == "language":
            same = record["machine"] == self.machine
        outcome, key = record["outcome"], self._key(record["kind"], record["spec"])
        if not same:
            return
        if record["kind"] == "language":
            every = sorted(record["spec"]["evaluations"])
            if sorted(outcome.get("evaluated", every)) == every:  # none was there before
                self.evaluations.setdefault(key, []).append(outcome["seconds"]["evaluations"])
            if outcome["trained"] > 0:
                each = outcome["seconds"]["train"] / outcome["trained"]
                self.alike.setdefault(key, []).append(each)
        elif outcome["steps"]:
            each = record["seconds"] / outcome["steps"]
            self.alike.setdefault(key, []).append(each)
            self.all.append(each / work(record["spec"]))

    @staticmethod
    def _key(kind: str, spec: dict[str, Any]) -> str:
        if kind == "language":
            phases = [[p["train"]["seq_len"], p["train"]["batch_rows"]] for p in spec["phases"]]
            return json.dumps([kind, phases, sorted(spec["evaluations"])])
        return json.dumps([kind, spec["mixer"]["mixer"], spec["task"], spec["width"]])

    def seconds(self, run: Run) -> tuple[float, str]:
        """(seconds of one run at most, where the figure comes from)."""
        key = self._key(run.kind, run.spec)
        if found := self.alike.get(key):
            rest = median(self.evaluations.get(key, [0.0]))
            return median(found) * self.left(run) + rest, "measured"
        if run.kind == "language":
            share = self.left(run) / run.steps
            return self.study.language[run.experiment].seconds * share, "assumed"
        if self.all:
            return median(self.all) * work(run.spec) * run.steps, "scaled by tokens"
        return self.study.seconds_per_step * run.steps, "assumed"

    def total(self, runs: Iterable[Run]) -> float:
        """Seconds on the clock for all of them, as many at a time as there are to be."""
        parallel = alone = 0.0
        for run in runs:
            if run.kind == "mqar":
                parallel += self.seconds(run)[0]
            else:
                alone += self.seconds(run)[0]
        return parallel / self.processes + alone / self.models
