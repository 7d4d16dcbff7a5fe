"""Where else the log goes: TensorBoard, Weights & Biases. Both take a kind, a step and values."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from osdn.errors import UserError
from osdn.train.recipe import Recipe

Value = float | list[float | None] | None


class Tracker(Protocol):
    """Takes what log.jsonl takes."""

    name: str

    def write(self, kind: str, step: int, values: dict[str, Value]) -> None: ...

    def close(self) -> None: ...


def open_trackers(
    recipe: Recipe, out: Path, step: int, tell: Callable[[str], None]
) -> list[Tracker]:
    """What the recipe asks for; a directory that refuses TensorBoard's file is reported.

    Raises:
        UserError: a package is not installed.
    """
    found: list[Tracker] = []
    wanted = recipe.logging.tensorboard
    # null means "if it is there"; true means that its absence is an error.
    if find_spec("tensorboard") is not None if wanted is None else wanted:
        try:
            found.append(TensorBoard(out, step))
        except OSError as error:
            tell(f"{TensorBoard.name}: {out / 'tensorboard'}: {_reason(error)}; it gets nothing")
    if recipe.logging.wandb is not None:
        found.append(WeightsAndBiases(out, recipe.logging.wandb, recipe.resolved()))
    return found


def flat(kind: str, values: dict[str, Value]) -> Iterator[tuple[str, float]]:
    """kind/name of every number; a list is one by layer; what is not finite is left out."""
    for name, value in values.items():
        if isinstance(value, list):
            # A tag a layer, so that the layers' curves lie in one chart.
            for layer, number in enumerate(value):
                if number is not None:
                    yield f"{kind}/{name}/layer_{layer}", number
        elif value is not None:
            yield f"{kind}/{name}", value


class TensorBoard:
    """Events in out/tensorboard; those after `step` are hidden, as the log's lines are cut off.

    They are written here and not in the thread of torch's SummaryWriter, whose errors nobody can
    catch: a disk that refuses would leave a traceback on the screen.

    Raises:
        UserError: the package is not installed.
        OSError: the directory takes no file.
    """

    name = "TensorBoard"

    def __init__(self, out: Path, step: int) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise UserError(
                "logging.tensorboard: needs the package tensorboard: pip install 'osdn[log]'; or "
                "set it to false"
            ) from error
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        directory = out / "tensorboard"
        directory.mkdir(exist_ok=True)
        # What TensorBoard's own writer calls it; it merges all files of a directory.
        place = f"{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (directory / f"events.out.tfevents.{place}").open("ab")
        self._writer = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")  # the first record of every event file
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(step=step + 1, session_log=start)  # hides events of this step and later ones

    def _add(self, **fields: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._file.flush()

    def write(self, kind: str, step: int, values: dict[str, Value]) -> None:
        """One event with all the values."""
        summary = self._summary()
        for name, number in flat(kind, values):
            summary.value.add(tag=name, simple_value=number)
        self._add(step=step, summary=summary)

    def close(self) -> None:
        """Close the file; every event is in it already."""
        self._file.close()


class WeightsAndBiases:
    """A run of a project, found again by its directory when the run is resumed.

    Raises:
        UserError: the package is not installed.
    """

    name = "Weights & Biases"

    def __init__(self, out: Path, project: str, recipe: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "logging.wandb: needs the wandb package: pip install wandb; or set it to null"
            ) from error
        # From the directory: a resumed run finds its own page again, without a file to lose.
        identity = blake2b(str(out.resolve()).encode(), digest_size=8).hexdigest()
        self._run = wandb.init(
            project=project, name=out.name, id=identity, resume="allow", dir=str(out), config=recipe
        )
        # Our steps and not wandb's own count, which starts again on resumption.
        self._run.define_metric("*", step_metric="step")

    def write(self, kind: str, step: int, values: dict[str, Value]) -> None:
        """The values under the run's own step."""
        self._run.log({"step": step, **dict(flat(kind, values))})

    def close(self) -> None:
        """Send what waits."""
        self._run.finish()


def safely(tracker: Tracker, act: Callable[[], None], tell: Callable[[str], None]) -> bool:
    """Do it; where the disk refuses, say so, and return False."""
    try:
        act()
    except OSError as error:
        tell(f"{tracker.name}: {_reason(error)}; it gets nothing more")
        return False
    return True


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
