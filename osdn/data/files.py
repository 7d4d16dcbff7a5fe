"""The files of a corpus: on this machine or behind a URL, plain, or compressed with gzip or zstd.

A name with `://` is opened by fsspec (s3://, gs://, https://, hf://, memory:// …), which needs the
protocol's package. A file that ends in .gz or .zst is decompressed while it is read;
what remains of the name says what is inside: `texts.jsonl.gz` is JSONL.
"""

import gzip
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape, glob
from io import BufferedReader
from pathlib import Path, PurePath
from typing import Any, BinaryIO, cast

from osdn.errors import UserError
from osdn.system.hub import hub_is_reachable

URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
COMPRESSED = (".gz", ".zst")
SKIPPED = 1 << 20  # decompressed bytes that are passed over at a time


@dataclass(frozen=True)
class SourceFile:
    """A file to read.

    name: a path, or a URL for fsspec.
    size: its bytes as it is stored.
    """

    name: str
    size: int

    def __str__(self) -> str:
        return self.name

    @property
    def compression(self) -> str:
        """ ".gz", ".zst" or ""."""
        suffix = PurePath(self.name).suffix.lower()
        return suffix if suffix in COMPRESSED else ""

    @property
    def suffix(self) -> str:
        """What is inside, in lower case: of texts.jsonl.gz it is .jsonl."""
        path = PurePath(self.name)
        return (path.with_suffix("") if self.compression else path).suffix.lower()

    def stored(self) -> BinaryIO:
        """The file as it is stored."""
        if not URL.match(self.name):
            return Path(self.name).open("rb")
        # Made in the process that reads: the connections of a fsspec file system survive no fork.
        system, path = file_system(self.name)
        return cast(BinaryIO, system.open(path, "rb"))

    @contextmanager
    def opened(self, offset: int) -> Iterator[BinaryIO]:
        """The file decompressed, from a byte of the text on.

        A compressed file has no way to that byte but from its start.

        Raises:
            UserError: the compressed data are damaged, or the package that reads them is missing.
        """
        with self.stored() as stored:
            try:
                with _decompressed(stored, self) as file:
                    if self.compression:
                        _skip(file, offset)
                    else:
                        file.seek(offset)
                    yield file
            except (EOFError, zlib.error, OSError) as error:
                if not self.compression or not _is_damage(error):
                    raise
                raise UserError(
                    f"data.corpus: {self.name}: damaged {self.compression} file: {error}; copy or "
                    "compress it again, or leave it out"
                ) from error


def _decompressed(stored: BinaryIO, file: SourceFile) -> BinaryIO:
    if file.compression == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=stored))
    if file.compression == ".zst":
        try:
            from pyarrow import CompressedInputStream, PythonFile
        except ImportError as error:
            raise UserError(
                f"data.corpus: {file.name} needs the pyarrow package: pip install 'osdn[data]'"
            ) from error
        return BufferedReader(CompressedInputStream(PythonFile(stored, mode="r"), "zstd"))
    return stored


def _is_damage(error: Exception) -> bool:
    """Whether a decoder raised it, and not the disk or the network under the decoder.

    pyarrow raises a plain OSError without a number; those of disks and networks have a number, or
    are of a class of their own.
    """
    if isinstance(error, gzip.BadGzipFile | EOFError | zlib.error):
        return True
    return type(error) is OSError and error.errno is None


def _skip(file: BinaryIO, offset: int) -> None:
    while offset > 0 and (passed := len(file.read(min(offset, SKIPPED)))):
        offset -= passed


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it.

    Raises:
        UserError: fsspec or the protocol's package is missing, or there is no such protocol.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise UserError(
            f"data.corpus: {url} needs the fsspec package: pip install 'osdn[data]'"
        ) from error
    try:
        system, path = url_to_fs(url)
    except (ImportError, ValueError) as error:  # the message names the package to install
        raise UserError(f"data.corpus: cannot open {url}: {_line(error)}") from error
    return system, path


def expand(names: Sequence[str]) -> list[SourceFile]:
    """The files that paths, URLs, globs (** included) and directories name, sorted, each once.

    Local files come first. One that is reached by several links is taken under the first of its
    names.

    Raises:
        UserError: a name matches nothing, or its file system does not answer.
    """
    local: set[Path] = set()
    remote: dict[str, SourceFile] = {}
    for name in names:
        listed = _listed(name) if URL.match(name) else []
        matching = set() if URL.match(name) else _matching(name)
        remote |= {file.name: file for file in listed}
        local |= matching
        if not listed and not matching:
            raise UserError(
                f"data.corpus: no file matches {name!r} (seen from {Path.cwd()}); give a path, a "
                "URL, a glob or a directory of text, .jsonl or .parquet files, 'stdlib', or "
                "'hf:NAME' for a Hugging Face dataset"
            )
    # By the file behind the name: a text that is read twice is weighed twice.
    once: dict[Path, Path] = {}
    for path in sorted(local):
        once.setdefault(path.resolve(), path)
    return [*map(local_file, once.values()), *(remote[name] for name in sorted(remote))]


def local_file(path: Path) -> SourceFile:
    """A file of this machine."""
    return SourceFile(str(path), path.stat().st_size)


def _listed(url: str) -> list[SourceFile]:
    """The files of a URL: one, those that match a glob, or all below a directory."""
    if url.startswith("hf://") and not hub_is_reachable():
        raise UserError(f"data.corpus: no network to read {url} from the Hugging Face Hub; connect")
    system, path = file_system(url)
    try:
        if not any(character in path for character in "*?["):
            found = system.find(path, detail=True)  # of a file: the file
        else:
            found = system.glob(path, detail=True)
        files = [(name, info) for name, info in found.items() if info["type"] == "file"]
        # A server that streams tells no size; 1 keeps the file from being taken for empty.
        return [
            SourceFile(system.unstrip_protocol(name), 1 if info["size"] is None else info["size"])
            for name, info in files
        ]
    except Exception as error:  # every protocol's package raises classes of its own
        raise UserError(f"data.corpus: cannot list {url}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _matching(name: str) -> set[Path]:
    """The local files of a path, a glob, or a directory."""
    path = Path(name).expanduser()
    # A path that exists is taken by its letters: "texts[1]" may be a directory.
    inside = escape(str(path)) if path.exists() else str(path)
    inside += "/**/*" if path.is_dir() else ""
    return {found for found in _glob(inside) if found.is_file()}


def _glob(pattern: str) -> Iterator[Path]:
    """glob(pattern, recursive=True), except that ** enters each directory once.

    Python's follows a link to a directory above it until the system refuses, 40 levels deep; two
    such links are 2 ** 40 paths.
    """
    parts = Path(pattern).parts
    if "**" not in parts:
        yield from map(Path, glob(pattern))
        return
    # Before the first ** glob is safe; what lies behind it is matched in every directory.
    level = parts.index("**")
    head = str(Path(*parts[:level])) if level else "."
    rest = [part for part in parts[level + 1 :] if part != "**"] or ["*"]
    seen: set[tuple[int, int]] = set()
    for start in glob(head):
        # Links are followed, as glob does, so that a corpus can be put together from links.
        for name, directories, _ in os.walk(start, followlinks=True):
            place = os.stat(name)
            if (place.st_dev, place.st_ino) in seen:
                directories.clear()  # seen: neither it nor what is below it again
                continue
            seen.add((place.st_dev, place.st_ino))
            # In place: os.walk goes where this list says.
            directories[:] = sorted(x for x in directories if not x.startswith("."))
            yield from map(Path, glob(str(Path(escape(name), *rest))))
