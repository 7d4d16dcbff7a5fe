"""The run's log: one JSON object a line, trackers beside it, and the result read from it."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from tqdm import tqdm

from osdn.errors import UserError
from osdn.train.log.trackers import Tracker, Value, safely


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    out: its directory; out/model holds the model and tokenizer.
    parameters: trained numbers.
    steps: optimiser steps made, skipped ones included.
    loss: (step, nats per token) of every logged step; None where the step was skipped.
    validation: (step, bits per byte of held-out text).
    tokens_per_s: median over the logged steps, validation and saving apart.
    nonfinite: steps skipped because the loss or its gradient was not finite.
    """

    out: Path
    parameters: int
    steps: int
    loss: list[tuple[int, float | None]]
    validation: list[tuple[int, float]]
    tokens_per_s: float
    nonfinite: int

    @property
    def bits_per_byte(self) -> float | None:
        """Of the last validation; None where there was none."""
        return self.validation[-1][1] if self.validation else None


def tell(message: str) -> None:
    """Show a line to the user, above the progress bar."""
    tqdm.write(message, file=sys.stderr)


class RunLog:
    """Appends to log.jsonl and to the trackers; a full disk delays lines until there is room.

    Args:
        out: the run's directory.
        step: of the checkpoint that the run goes on from. Later lines, and the validation at that
            step, which will be made again, are cut off.
        trackers: get the same.
        tell: shows a message to the user.
    """

    def __init__(
        self, out: Path, *, step: int, trackers: Sequence[Tracker], tell: Callable[[str], None]
    ) -> None:
        self.path, self.tell, self.trackers = out / "log.jsonl", tell, list(trackers)
        self._file = self.path.open("ab", buffering=0)
        self._size = _kept(self.path, step)
        self._file.truncate(self._size)
        self._pending = b""
        self._told = False

    def write(self, kind: str, step: int, **values: Value) -> None:
        """One line, at once; None stands for a number that is not finite."""
        line = json.dumps({"kind": kind, "step": step, **values}, allow_nan=False)
        self._pending += line.encode() + b"\n"
        try:
            self._flush()
        except OSError as error:
            if not self._told:
                self.tell(f"{self.path}: {error.strerror}; its lines wait in memory")
                self._told = True
        self.trackers = [
            tracker
            for tracker in self.trackers
            if safely(tracker, partial(tracker.write, kind, step, values), self.tell)
        ]

    def _flush(self) -> None:
        data = self._pending
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError:
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


def _kept(path: Path, step: int) -> int:
    """Bytes of the log that a run going on from `step` keeps."""
    kept = 0
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
                late = record["step"] + (record["kind"] == "validation") > step
            except (ValueError, KeyError, TypeError):  # a line that a kill cut off
                break
            if late or not line.endswith(b"\n"):
                break
            kept += len(line)
    return kept


def read_result(out: Path, *, parameters: int, steps: int, nonfinite: int) -> TrainResult:
    """The result of a finished run, from its log.

    Raises:
        UserError: the log is not there, or a line of it is none that a run writes.
    """
    path, loss, validation, speeds = out / "log.jsonl", [], [], []
    line = 0
    try:
        for text in path.read_bytes().splitlines():
            line += 1
            record = json.loads(text)
            if record["kind"] == "train":
                loss.append((record["step"], record["loss"]))
                speeds.append(record["tokens_per_s"])
            elif record["kind"] == "validation":
                validation.append((record["step"], record["bits_per_byte"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        wrong = f"line {line} is not what a run writes"
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
