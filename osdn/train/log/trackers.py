"""Where else the log goes: TensorBoard, Weights & Biases. Both take a kind, a step and values."""

from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

from osdn.errors import UserError

Value = float | list[float | None] | None


class Tracker(Protocol):
    """Takes what log.jsonl takes."""

    name: str

    def write(self, kind: str, step: int, values: dict[str, Value]) -> None: ...

    def close(self) -> None: ...


def flat(kind: str, values: dict[str, Value]) -> Iterator[tuple[str, float]]:
    """kind/name of every number; a list is one by layer; what is not finite is left out."""
    for name, value in values.items():
        if isinstance(value, list):
            for layer, number in enumerate(value):
                if number is not None:
                    yield f"{kind}/{name}/layer_{layer}", number
        elif value is not None:
            yield f"{kind}/{name}", value


class TensorBoard:
    """Events in out/tensorboard; those after `step` are hidden, as the log's lines are cut off.

    Raises:
        UserError: the package is not installed.
    """

    name = "TensorBoard"

    def __init__(self, out: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "logging.tensorboard: needs the package tensorboard: pip install 'osdn[log]'; or "
                "set it to false"
            ) from error
        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def write(self, kind: str, step: int, values: dict[str, Value]) -> None:
        for name, value in flat(kind, values):
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of a project, found again by its directory when the run goes on.

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
        identity = blake2b(str(out.resolve()).encode(), digest_size=8).hexdigest()
        self._run = wandb.init(
            project=project, name=out.name, id=identity, resume="allow", dir=str(out), config=recipe
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, kind: str, step: int, values: dict[str, Value]) -> None:
        self._run.log({"step": step, **dict(flat(kind, values))})

    def close(self) -> None:
        self._run.finish()


def safely(tracker: Tracker, act: Callable[[], None], tell: Callable[[str], None]) -> bool:
    """Do it; where the disk refuses, say so, and return False."""
    try:
        act()
    except OSError as error:
        tell(f"{tracker.name}: {error.strerror or error}; it gets nothing more")
        return False
    return True
