"""Checkpoints: written whole or not at all, checked before they are read, never code.

A checkpoint is a directory step_N with

    model.safetensors   weights
    state.pt            optimiser, step, random states, data position (torch.load weights_only)
    recipe.json         the resolved recipe
    manifest.json       the SHA-256 of the other three

It is written under a temporary name, every file and then the directory is synced to the disk,
and only then it gets its name: after a crash at any moment what bears the name is whole.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_model
from torch import nn

from osdn.errors import UserError

WEIGHTS, STATE, RECIPE, MANIFEST = "model.safetensors", "state.pt", "recipe.json", "manifest.json"
TEMPORARY = ".writing-"

# What may differ on resumption, since the weights do not depend on it. train.steps is not among
# them: the cosine stretches to it from the first step on.
FREE = ("logging.", "train.checkpoint_every", "train.keep_checkpoints", "train.validate_every")


class Checkpoint(NamedTuple):
    """A checkpoint that was found whole."""

    directory: Path
    state: dict[str, Any]


class _Damaged(Exception):
    pass


def save(
    root: Path, step: int, model: nn.Module, state: dict[str, Any], recipe: dict, *, keep: int
) -> None:
    """Write root/step_N and then remove all but the newest `keep`.

    Raises:
        OSError: it could not be written (the disk is full, ...); the others are untouched.
    """
    target = root / f"step_{step}"
    unfinished = root / f"{TEMPORARY}{target.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_unfinished(root)
        unfinished.mkdir()
        _write_tensors(unfinished, model, state)
        (unfinished / RECIPE).write_text(json.dumps(recipe, indent=1))
        digests = {name: _digest(unfinished / name) for name in (WEIGHTS, STATE, RECIPE)}
        (unfinished / MANIFEST).write_text(json.dumps(digests, indent=1))
        for path in (*unfinished.iterdir(), unfinished):
            sync(path)
        os.rename(unfinished, target)
        sync(root)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    for old in _directories(root)[keep:]:
        shutil.rmtree(old, ignore_errors=True)


def _write_tensors(directory: Path, model: nn.Module, state: dict[str, Any]) -> None:
    """Weights and state; what their writers make of an OSError is one again."""
    try:
        save_model(model, str(directory / WEIGHTS))
        with (directory / STATE).open("wb") as file:
            torch.save(state, file)
    except SafetensorError as error:
        raise OSError(None, str(error)) from error
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def load_newest(root: Path, recipe: dict, tell: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint of the run, or None where there is none yet.

    A damaged one is told of, renamed to step_N.damaged, and the one before is taken.

    Raises:
        UserError: all are damaged, one may hold code, or the recipe is not the run's.
    """
    directories = _directories(root)
    for directory in directories:
        try:
            _verify(directory)
        except _Damaged as error:
            aside = directory.with_name(directory.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            directory.rename(aside)
            tell(f"{directory} is damaged ({error}); going back to the checkpoint before it")
            continue
        saved = json.loads((directory / RECIPE).read_text())
        if difference := first_difference(saved, recipe):
            key, before, now = difference
            raise UserError(
                f"{key}: {directory} was made with {before!r}, and this run asks for {now!r}; "
                "use the old value, or give the new run a directory of its own (--out)"
            )
        return Checkpoint(directory, _load_state(directory / STATE))
    if directories or list(root.glob("step_*.damaged")):
        raise UserError(
            f"{root}: holds damaged checkpoints and no whole one; move it away to start anew"
        )
    return None


def _verify(directory: Path) -> None:
    content = (WEIGHTS, STATE, RECIPE)
    for path in directory.iterdir():
        if path.name not in (*content, MANIFEST):
            raise UserError(
                f"{path}: not a file of a checkpoint, and it may hold code, as pickles do; the "
                "checkpoint is refused: remove the file if you know where it comes from"
            )
    try:
        digests = json.loads((directory / MANIFEST).read_text())
        for name in content:
            if _digest(directory / name) != digests[name]:
                raise _Damaged(f"{name} is not what was written")
    except OSError as error:
        raise _Damaged(f"{Path(error.filename or directory).name}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise _Damaged(f"{MANIFEST} is not readable") from error


def _load_state(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{path}: holds more than numbers, and loading it could run code; the checkpoint is "
            "refused: move it away to go on from the one before"
        ) from error


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


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _directories(root: Path) -> list[Path]:
    """The checkpoints, newest first."""
    found = [p for p in root.glob("step_*") if p.name.removeprefix("step_").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")), reverse=True)
