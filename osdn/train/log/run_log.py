"""The run's log: one JSON object a line, trackers beside it, and the result read from it."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from statistics import median

from pydantic import Field
from tqdm import tqdm

from osdn.errors import UserError
from osdn.system.files import sync, write_whole
from osdn.system.outside import Malformed, Outside, parse_json
from osdn.train.log.trackers import Tracker, Value, safely


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    out: its directory; out/model holds the model and tokenizer.
    parameters: trained numbers.
    steps: optimizer steps made, skipped ones included.
    loss: (step, nats per token) of every logged step; None where the step was skipped.
    validation: (step, bits per byte of held-out text); None where they were not finite.
    tokens_per_s: median over the logged steps, validation and saving apart.
    nonfinite: steps skipped because the loss or its gradient was not finite.
    """

    out: Path
    parameters: int
    steps: int
    loss: list[tuple[int, float | None]]
    validation: list[tuple[int, float | None]]
    tokens_per_s: float
    nonfinite: int

    @property
    def bits_per_byte(self) -> float | None:
        """Of the last validation; None where there was none."""
        return self.validation[-1][1] if self.validation else None


def tell(message: str) -> None:
    """Show a line to the user, above the progress bar."""
    tqdm.write(message, file=sys.stderr)


class LogLine(Outside):
    """What every line of the log has."""

    kind: str
    step: int = Field(ge=0)


class TrainLine(LogLine):
    """A step; loss is None where it was skipped."""

    loss: float | None
    tokens_per_s: float


class ValidationLine(LogLine):
    """A validation."""

    bits_per_byte: float | None


class RunLog:
    """Appends to log.jsonl and to the trackers; a full disk delays lines until there is room.

    Args:
        out: the run's directory.
        step: of the checkpoint that the run resumes from. Later lines, and the validation at that
            step, which will be repeated, are cut off.
        logged: the last step that was logged when the checkpoint was saved; None if it is not
            known, as in checkpoints of earlier versions.
        trackers: get the same.
        tell: shows a message to the user.
    """

    def __init__(
        self,
        out: Path,
        *,
        step: int,
        logged: int | None = 0,
        trackers: Sequence[Tracker],
        tell: Callable[[str], None],
    ) -> None:
        self.path, self.tell, self.trackers = out / "log.jsonl", tell, list(trackers)
        self.logged = self._take_up(step, logged)  # the newest step with a line
        # Unbuffered: a line that was written is a line that `tail -f` shows.
        self._file = self.path.open("ab", buffering=0)
        # What is whole, to cut back to after a refusal.
        self._size = os.fstat(self._file.fileno()).st_size
        self._pending = b""
        self._told = False

    def _take_up(self, step: int, logged: int | None) -> int:
        """Cut the log off behind `step`; the newest step that is left of it.

        A last line that is not whole is dropped, since a kill leaves one. Any other damage is told,
        and the file is kept aside, with all that it holds, before the good lines are taken over.
        """
        # In bytes: a damaged file need not be UTF-8.
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        kept: list[bytes] = []
        bad: list[int] = []
        newest = 0
        for number, text in enumerate(lines, start=1):
            try:
                line = parse_json(text, LogLine, "")
            except Malformed:
                bad.append(number)
                continue
            if not text.endswith(b"\n"):
                bad.append(number)
            # A validation at `step` comes again, a training line at `step` does not.
            elif line.step + (line.kind == "validation") <= step:
                kept.append(text)
                newest = max(newest, line.step if line.kind == "train" else 0)
        # The last line is excused, the others are not.
        damaged = [number for number in bad if number < len(lines)]
        if damaged:
            aside = _unused(self.path.with_name("log.jsonl.damaged"))
            self.tell(
                f"{self.path}: line {damaged[0]} is not what a run writes"
                f"{f', and {len(damaged) - 1} more' if damaged[1:] else ''}; the file is kept as "
                f"{aside.name}, and its other lines stay in the log"
            )
            # Copied before anything is changed.
            shutil.copyfile(self.path, aside)
            sync(aside)
        if step and logged is not None and newest < logged:
            state = f"ends at step {newest}" if kept else "is missing or empty"
            self.tell(
                f"{self.path}: expected lines up to step {logged}, and the log {state}; the lines "
                "between are lost, the weights are not"
            )
        if damaged:
            write_whole(self.path, b"".join(kept))
        elif lines:  # the good lines come first, and cutting takes no room on a full disk
            os.truncate(self.path, sum(map(len, kept)))
        return newest

    def write(self, kind: str, step: int, **values: Value) -> None:
        """One line, at once; None stands for a number that is not finite."""
        if kind == "train":
            self.logged = step
        # allow_nan=False: a NaN would be no JSON
        line = json.dumps({"kind": kind, "step": step, **values}, allow_nan=False)
        # Lines wait here in order, so that a disk with room again gets all of them.
        self._pending += line.encode() + b"\n"
        try:
            self._flush()
        # Training goes on: a log is worth less than the run.
        except OSError as error:
            if not self._told:
                self.tell(f"{self.path}: {error.strerror}; its lines wait in memory")
                self._told = True
        # One that fails is dropped, and the others go on.
        self.trackers = [
            tracker
            for tracker in self.trackers
            if safely(tracker, partial(tracker.write, kind, step, values), self.tell)
        ]

    def _flush(self) -> None:
        data = self._pending
        try:
            while data:
                data = data[self._file.write(data) :]  # a write may take a part of it
        except OSError:
            # No half line stays: the next line would be glued to it.
            self._file.truncate(self._size)
            raise
        self._size += len(self._pending)
        self._pending, self._told = b"", False

    def sync(self) -> None:
        """Wait until every line is on the disk, so that no checkpoint is ahead of the log.

        Raises:
            OSError: the disk is full.
        """
        self._flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what waits, if it can be written, and close."""
        try:
            self._flush()
        except OSError as error:
            lines = self._pending.count(b"\n")
            self.tell(f"{self.path}: {error.strerror}; its last {lines} lines are lost")
        self._file.close()
        for tracker in self.trackers:
            safely(tracker, tracker.close, self.tell)


def _unused(path: Path) -> Path:
    """The path, or with a number after it where a file has that name."""
    numbered = (path.with_name(f"{path.name}.{i}") for i in count(1))
    return next(name for name in chain([path], numbered) if not name.exists())


def read_result(out: Path, *, parameters: int, steps: int, nonfinite: int) -> TrainResult:
    """The result of a finished run, from its log.

    Raises:
        UserError: the log is not there, or a line of it is none that a run writes.
    """
    path = out / "log.jsonl"
    loss: list[tuple[int, float | None]] = []
    validation: list[tuple[int, float | None]] = []
    speeds: list[float] = []
    number = 0
    try:
        for text in path.read_bytes().splitlines():
            number += 1
            # The kind first: lines of other kinds may have any fields.
            kind = parse_json(text, LogLine, "").kind
            if kind == "train":
                step = parse_json(text, TrainLine, "")
                loss.append((step.step, step.loss))
                speeds.append(step.tokens_per_s)
            elif kind == "validation":
                measured = parse_json(text, ValidationLine, "")
                validation.append((measured.step, measured.bits_per_byte))
    except (OSError, Malformed) as error:
        wrong = f"line {number} is not what a run writes"
        if isinstance(error, OSError):
            wrong = f"it cannot be read ({error.strerror})"
        raise UserError(
            f"{path}: expected the log of a finished run, and {wrong}; restore it, or train "
            f"anew in another directory (--out); the model itself is in {out / 'model'}"
        ) from error
    return TrainResult(
        out=out,
        parameters=parameters,
        steps=steps,
        loss=loss,
        validation=validation,
        tokens_per_s=median(speeds) if speeds else 0.0,
        nonfinite=nonfinite,
    )
