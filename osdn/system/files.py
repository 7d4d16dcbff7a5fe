"""Whole files: written beside their place, synced, renamed. A reader sees the old or the new one.

A process that is killed while it writes leaves its temporary file. The next write to the same place
removes it: a writer holds a lock on its temporary file, and a file that nobody holds is a leftover.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows, which refuses to delete a file that somebody has open
    fcntl = None  # type: ignore[assignment]

TEMPORARY = ".writing-"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to; it takes the place of `path` at the end, or never.

    The new file has the old one's mode. A link is followed; a device or a pipe is written to
    directly, since it cannot be replaced.

    Raises:
        OSError: the disk does not take the file. `path` is unchanged, and nothing is left beside
            it; the same holds for an exception from the caller.
    """
    # /dev/stdout, a pipe: there is nothing to rename.
    if path.exists() and not path.is_file():
        with path.open("wb") as device:
            yield device
        return
    # Through links: a rename would replace the link itself.
    target = Path(os.path.realpath(path))
    _remove_leftovers(target)
    file, unfinished = _temporary(target)
    try:
        with file:
            if target.exists():
                # A new file has the umask's mode, and the old one's owner may have narrowed it.
                unfinished.chmod(target.stat().st_mode & 0o7777)
            yield file
            flush(file)
        # Content first, then the name, then the directory that holds the name.
        os.replace(unfinished, target)
        sync(target.parent)
    except BaseException:  # Ctrl-C too
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all; text as UTF-8.

    Raises:
        OSError: the disk does not take it.
    """
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all.

    Raises:
        OSError: the disk does not take it.
    """
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def sha256(path: Path) -> str:
    """A file's SHA-256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(file: Any) -> None:
    """Wait until an open file's content is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no directories
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(target: Path) -> tuple[BinaryIO, Path]:
    """An open file beside the target, locked where the file system has locks; and its path."""
    while True:
        path = target.with_name(f"{TEMPORARY}{target.name}-{token_hex(4)}")
        file = path.open("xb")
        if fcntl is not None:
            with suppress(OSError):  # no locks here: what a kill leaves stays
                fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink == 0:  # taken for a leftover before it was locked
                file.close()
                continue
        return file, path


def _remove_leftovers(target: Path) -> None:
    """Delete the temporary files of writers that are gone."""
    with suppress(OSError):
        for path in target.parent.iterdir():
            name = path.name.removeprefix(TEMPORARY)
            if name == path.name or name.rpartition("-")[0] != target.name:
                continue
            with suppress(OSError), path.open("rb") as file:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
