"""Which shards are there whole, so that `osdn tokenize` makes the others anew."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from osdn.data.shards import Shard, shard_files
from osdn.system.files import sha256
from osdn.system.outside import Malformed, Outside, read_json


class ShardNote(Outside):
    """A shard's .json: its line of the manifest, where the source goes on, and if it ends there."""

    shard: Shard
    position: Any
    last: bool


def finished_shard(directory: Path, name: str, dtype: np.dtype[Any]) -> ShardNote | None:
    """What a shard's .json holds; None if there is none, or its files are not those it names."""
    path = directory / f"{name}.json"
    if not path.is_file():
        return None
    try:
        # Written last: it is there only if the two files are.
        note: ShardNote | None = read_json(path, ShardNote)
    except Malformed:
        note = None
    if note is None or note.shard.name != name or not _whole(directory, note.shard, dtype):
        tqdm.write(f"{directory / name}.*: missing or damaged, made anew", sys.stderr)
        return None
    return note


def _whole(directory: Path, shard: Shard, dtype: np.dtype[Any]) -> bool:
    """Whether both files are what was written. Reading them takes a fraction of making them."""
    files = shard_files(directory, shard, dtype)
    # Sizes first, which costs nothing; digests only of what could be right.
    sized = all(file.is_file() and file.stat().st_size == size for file, size in files)
    return sized and [sha256(file) for file, _ in files] == shard.sha256
