"""Checkpoints: written whole or not at all, checked before they are read, never code.

A checkpoint is a directory step_N with

    shard-R-model-….safetensors   parameters and moments, the share that process R wrote
    state.json                    step, counters, the data's position in every process
    recipe.json                   the resolved recipe
    manifest.json                 the SHA-256 of every other file

PyTorch's distributed checkpoint (DCP) plans who writes what, copies it to the host and writes it in
another thread while training continues, with its safetensors storage, whose plan is the header of
each file: the pickle of its default storage could hold code, so it is neither written nor read.
It is written under a temporary name, every file is synced to the disk, then rank 0 adds the
rest and gives the directory its name: after a crash at any moment what bears the name is whole.
"""

import math
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY

from osdn.errors import UserError
from osdn.layers.gates import former_names
from osdn.system.files import TEMPORARY, sha256
from osdn.system.outside import Malformed, Outside, parse_json, read_json
from osdn.train.distributed.parallel import Parallel

STATE, RECIPE, MANIFEST = "state.json", "recipe.json", "manifest.json"
# DCP's name for the one file of a process
SHARD = re.compile(r"shard-\d{5}-model-00001-of-00001\.safetensors")
NAME = re.compile(r"step_([0-9]{1,18})")  # 18 digits: a step that fits in 64 bits
DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}

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


T = TypeVar("T")


class State(Outside):
    """state.json.

    step, nonfinite, in_a_row, parameters: the run's counters.
    read: fingerprints of what the rows' own state does not know; empty in earlier versions.
    logged: the newest step in the log; None in earlier versions.
    data: where the rows of each process were, by rank.
    """

    step: int = Field(ge=1)
    nonfinite: int = Field(ge=0)
    in_a_row: int = Field(ge=0)
    parameters: int = Field(ge=0)
    read: dict[str, str] = Field(default_factory=dict)
    logged: int | None = None
    data: list[dict[str, Any]] = Field(min_length=1)


class Chunk(Outside):
    """In a file's header: where a tensor's share begins in the whole."""

    saved_offsets: list[Annotated[int, Field(ge=0)]]


class Checkpoint(NamedTuple):
    """A checkpoint that was found whole."""

    directory: Path
    state: State


class _Damaged(Exception):
    pass


def load_tensors(directory: Path, tensors: dict[str, Tensor], parallel: Parallel) -> None:
    """Fill the tensors, sharded as they may be, from a checkpoint that was found whole.

    Raises:
        UserError: the checkpoint's tensors are not these.
    """
    tensors = _as_named(directory, tensors)
    # DCP believes a file's header, and would leave gaps unwritten.
    _check_layout(directory, tensors)
    reader = dcp.HuggingFaceStorageReader(str(directory))
    try:
        dcp.load(dict(tensors), storage_reader=reader, process_group=parallel.saving)
    except CheckpointException as error:
        # DCP wraps what happened in a process; the cause says it.
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, OSError | MemoryError):
            raise
        raise _other_tensors(directory, str(cause)) from error


def _as_named(directory: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names that the checkpoint has for them."""
    names: set[str] = set()
    for path in directory.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                names.update(file.keys())
        except SafetensorError as error:
            raise _refused(path) from error
    former = {now: before for before, now in former_names(names).items()}
    return {former.get(name, name): x for name, x in tensors.items()}


def _check_layout(directory: Path, tensors: dict[str, Tensor]) -> None:
    """That the files' chunks make up every tensor, before DCP believes their headers."""
    # Numbers found for each tensor, over all files. They must add up to it.
    sizes = dict.fromkeys(tensors, 0)
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(CUSTOM_METADATA_KEY, "")
                chunks = parse_json(text, dict[str, Chunk], str(path))
                for name in file.keys():  # noqa: SIM118  not a dictionary
                    if name not in tensors or name not in chunks:
                        raise _other_tensors(directory, f"{name} is not expected in {path.name}")
                    part, whole = file.get_slice(name), tensors[name]
                    # where this share ends in the whole
                    ends = [a + n for a, n in zip(chunks[name].saved_offsets, part.get_shape())]
                    fits = len(ends) == len(part.get_shape()) == whole.ndim
                    fits = fits and all(end <= n for end, n in zip(ends, whole.shape))
                    if not fits or part.get_dtype() != DTYPES.get(whole.dtype):
                        raise _other_tensors(
                            directory,
                            f"{name} is {part.get_dtype()} of {part.get_shape()} in {path.name}, "
                            f"for {whole.dtype} of {list(whole.shape)}",
                        )
                    sizes[name] += math.prod(part.get_shape())
        except SafetensorError as error:
            raise _refused(path) from error
    for name, size in sizes.items():
        if size != tensors[name].numel():
            raise _other_tensors(
                directory, f"{name} has {size:,} numbers of {tensors[name].numel():,}"
            )


def _other_tensors(directory: Path, reason: str) -> UserError:
    return UserError(
        f"{directory}: its tensors are not those of this model ({' '.join(reason.split())}); the "
        "checkpoint is refused: move it away to resume from the one before"
    )


def load_newest(root: Path, recipe: dict, tell: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint of the run, or None where there is none yet.

    A damaged one is told of, renamed to step_N.damaged, and the one before is taken.

    Raises:
        UserError: all are damaged, one may hold code, or the recipe is not the run's.
    """
    found = directories(root)
    # Newest first; a damaged one costs the steps after the one before it.
    for directory in found:
        try:
            _verify(directory)
        except _Damaged as error:
            # Renamed and not deleted: it may hold what its owner still wants.
            aside = directory.with_name(directory.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            directory.rename(aside)
            tell(f"{directory} is damaged ({error}); going back to the checkpoint before it")
            continue
        saved = _read(directory / RECIPE, dict[str, Any])
        state = _read(directory / STATE, State)
        if directory.name != f"step_{state.step}":
            raise UserError(
                f"{directory}: expected step_{state.step}, since its state is of that step; give "
                "it that name, or move it away"
            )
        # The one before would differ just as well, so this ends the search.
        if difference := first_difference(saved, recipe):
            key, before, now = difference
            raise UserError(
                f"{key}: {directory} was made with {before!r}, and this run asks for {now!r}; "
                "use the old value, or give the new run a directory of its own (--out)"
            )
        return Checkpoint(directory, state)
    # Starting anew would look like a resumed run, and lose everything without a word.
    if found or list(root.glob("step_*.damaged")):
        raise UserError(
            f"{root}: holds damaged checkpoints and no whole one; move it away to start anew"
        )
    return None


def _verify(directory: Path) -> None:
    # Files that a run does not write are refused by name, before any is opened.
    names = {path.name for path in directory.iterdir()}
    for name in names:
        if name not in (STATE, RECIPE, MANIFEST) and not SHARD.fullmatch(name):
            raise UserError(
                f"{directory / name}: not a file of a checkpoint, and it may hold code, as "
                "pickles do; the checkpoint is refused: remove the file if you know where it "
                "comes from"
            )
    try:
        digests = read_json(directory / MANIFEST, dict[str, str])
        # Both ways: no file without a digest, and none missing that has one.
        if unknown := names - {MANIFEST} - set(digests):
            raise _Damaged(f"{min(unknown)} is not in {MANIFEST}")
        for name in {STATE, RECIPE, *digests}:
            # Only the last part of a name: nothing outside the directory is read.
            if name not in digests or sha256(directory / Path(name).name) != digests[name]:
                raise _Damaged(f"{name} is not what was written")
    except OSError as error:
        raise _Damaged(f"{Path(error.filename or directory).name}: {error.strerror}") from error
    except (Malformed, ValueError) as error:  # ValueError: a NUL in a name
        raise _Damaged(f"{MANIFEST} is not readable") from error


def _refused(path: Path, reason: str = "holds something else than numbers") -> UserError:
    """A file whose digest is right and whose content is not: we did not write it."""
    return UserError(
        f"{path}: {reason}, which could be code; the checkpoint is "
        "refused: move it away to resume from the one before"
    )


def _read(path: Path, schema: type[T]) -> T:
    try:
        return read_json(path, schema)
    except Malformed as error:
        raise _refused(path, f"not what a run writes ({error.reason})") from error


def remove_unfinished(root: Path) -> None:
    """Delete what a save that was interrupted left under a temporary name."""
    # Only rank 0 saves here, under the run's lock, so nobody else's save is touched.
    for leftover in root.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover)


def first_difference(saved: dict, now: dict, prefix: str = "") -> tuple[str, Any, Any] | None:
    """(key, saved value, value now) of the first field that differs and is not FREE."""
    for name in [*saved, *(name for name in now if name not in saved)]:
        key, before, after = prefix + name, saved.get(name), now.get(name)
        if isinstance(before, dict) and isinstance(after, dict):  # sections within sections
            if found := first_difference(before, after, key + "."):
                return found
        elif before != after and not key.startswith(FREE):
            return key, before, after
    return None


def directories(root: Path) -> list[Path]:
    """The checkpoints, newest first."""
    return [path for _, path in _by_step(root)]


def newest_step(root: Path) -> int:
    """The step of the newest checkpoint, whole or not; 0 without one."""
    return next((step for step, _ in _by_step(root)), 0)


def _by_step(root: Path) -> list[tuple[int, Path]]:
    """Step and directory of each checkpoint, newest first."""
    named = ((NAME.fullmatch(path.name), path) for path in root.glob("step_*") if path.is_dir())
    return sorted(((int(name[1]), path) for name, path in named if name), reverse=True)
