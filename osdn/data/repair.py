"""Which shards are there whole, so that `osdn tokenize` makes those anew that are not."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from osdn.data.shards import Shard, sha256, shard_files


def finished_shard(directory: Path, name: str, dtype: np.dtype[Any]) -> dict[str, Any] | None:
    """What a shard's .json holds; None where there is none, or not the files that it tells of."""
    path = directory / f"{name}.json"
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        shard = Shard(**found["shard"])
        files = shard_files(directory, shard, dtype)
        sound = shard.name == name and {"position", "last"} <= found.keys()
        sound = sound and all(file.is_file() and file.stat().st_size == n for file, n in files)
        # To read a shard takes a fraction of the time that made it.
        sound = sound and [sha256(file) for file, _ in files] == shard.sha256
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        tqdm.write(f"{directory / name}.*: missing or damaged, made anew", sys.stderr)
    return found if sound else None
