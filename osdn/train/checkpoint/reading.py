"""Checkpoints: written whole or not at all, checked before they are read, never code.

A checkpoint is a directory step_N with

    shard-R-model-….safetensors   parameters and moments, the share that process R wrote
    state.json                    step, counters, the data's position in every process
    recipe.json                   the resolved recipe
    manifest.json                 the SHA-256 of every other file

PyTorch's distributed checkpoint (DCP) plans who writes what, copies it to the host and writes it in
another thread while training goes on, with its safetensors storage, whose plan is the header of
each file: the pickle of its default storage could hold code, so it is neither written nor read.
It is written under a temporary name, every file is synced to the disk, then rank 0 adds the
rest and gives the directory its name: after a crash at any moment what bears the name is whole.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from osdn.data.shards import sha256
from osdn.errors import UserError
from osdn.train.distributed.parallel import Parallel

STATE, RECIPE, MANIFEST = "state.json", "recipe.json", "manifest.json"
SHARD = re.compile(r"shard-\d{5}-model-00001-of-00001\.safetensors")
TEMPORARY = ".writing-"

# What may differ on resumption, since the weights depend on it by rounding at most. train.steps is
# not among them: the cosine stretches to it from the first step on.
FREE = (
    "data.workers",
    "logging.",
    "parallel.",
    "train.activation_checkpointing",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.rows",
    "train.validate_every",
)

# One process needs no process group, which is no news.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


class Checkpoint(NamedTuple):
    """A checkpoint that was found whole."""

    directory: Path
    state: dict[str, Any]


class _Damaged(Exception):
    pass


def load_tensors(directory: Path, tensors: dict[str, Tensor], parallel: Parallel) -> None:
    """Fill the tensors, sharded as they may be, from a checkpoint that was found whole."""
    reader = dcp.HuggingFaceStorageReader(str(directory))
    try:
        dcp.load(dict(tensors), storage_reader=reader, process_group=parallel.saving)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if not isinstance(cause, KeyError | RuntimeError | ValueError):
            raise
        raise UserError(
            f"{directory}: its tensors are not those of this model ({cause}); the checkpoint is "
            "refused: move it away to go on from the one before"
        ) from error


def load_newest(root: Path, recipe: dict, tell: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint of the run, or None where there is none yet.

    A damaged one is told of, renamed to step_N.damaged, and the one before is taken.

    Raises:
        UserError: all are damaged, one may hold code, or the recipe is not the run's.
    """
    found = directories(root)
    for directory in found:
        try:
            _verify(directory)
        except _Damaged as error:
            aside = directory.with_name(directory.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            directory.rename(aside)
            tell(f"{directory} is damaged ({error}); going back to the checkpoint before it")
            continue
        _check_tensors(directory)
        saved, state = _read(directory / RECIPE), _read(directory / STATE)
        if difference := first_difference(saved, recipe):
            key, before, now = difference
            raise UserError(
                f"{key}: {directory} was made with {before!r}, and this run asks for {now!r}; "
                "use the old value, or give the new run a directory of its own (--out)"
            )
        return Checkpoint(directory, state)
    if found or list(root.glob("step_*.damaged")):
        raise UserError(
            f"{root}: holds damaged checkpoints and no whole one; move it away to start anew"
        )
    return None


def _verify(directory: Path) -> None:
    names = {path.name for path in directory.iterdir()}
    for name in names:
        if name not in (STATE, RECIPE, MANIFEST) and not SHARD.fullmatch(name):
            raise UserError(
                f"{directory / name}: not a file of a checkpoint, and it may hold code, as "
                "pickles do; the checkpoint is refused: remove the file if you know where it "
                "comes from"
            )
    try:
        digests = json.loads((directory / MANIFEST).read_text())
        if unknown := names - {MANIFEST} - set(digests):
            raise _Damaged(f"{min(unknown)} is not in {MANIFEST}")
        for name in {STATE, RECIPE, *digests}:
            if sha256(directory / Path(name).name) != digests[name]:
                raise _Damaged(f"{name} is not what was written")
    except OSError as error:
        raise _Damaged(f"{Path(error.filename or directory).name}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise _Damaged(f"{MANIFEST} is not readable") from error


def _refused(path: Path) -> UserError:
    """A file whose digest is right and whose content is not: we did not write it."""
    return UserError(
        f"{path}: holds something else than numbers, which could be code; the checkpoint is "
        "refused: move it away to go on from the one before"
    )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise _refused(path) from error


def _check_tensors(directory: Path) -> None:
    for path in directory.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise _refused(path) from error


def remove_unfinished(root: Path) -> None:
    """Delete what a save that was interrupted left under a temporary name."""
    for leftover in root.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover)


def first_difference(saved: dict, now: dict, prefix: str = "") -> tuple[str, Any, Any] | None:
    """(key, saved value, value now) of the first field that differs and is not FREE."""
    for name in [*saved, *(name for name in now if name not in saved)]:
        key, before, after = prefix + name, saved.get(name), now.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            if found := first_difference(before, after, key + "."):
                return found
        elif before != after and not key.startswith(FREE):
            return key, before, after
    return None


def sync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def directories(root: Path) -> list[Path]:
    """The checkpoints, newest first."""
    named = (p for p in root.glob("step_*") if p.name.removeprefix("step_").isdigit())
    found = [p for p in named if p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")), reverse=True)


def newest_step(root: Path) -> int:
    """The step of the newest checkpoint, whole or not; 0 without one."""
    return next((int(p.name.removeprefix("step_")) for p in directories(root)), 0)
