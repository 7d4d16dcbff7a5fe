"""Documents of local files: text, JSONL and Parquet."""

import os
from collections.abc import Iterator, Sequence
from glob import escape, glob
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Any

from pydantic import TypeAdapter, ValidationError

from osdn.data.documents import WHOLE, Count, Document, Key, Share, content_key
from osdn.data.readers import READERS, Found, Offset, read_text
from osdn.errors import UserError
from osdn.system.outside import shown
from osdn.system.retry import persevere

# What `read` yields. Two offsets: within a record, whose key must then be known.
POSITION = TypeAdapter(tuple[Count, Count | tuple[Count, Count], Key | None, Count])


def expand(patterns: Sequence[str]) -> list[Path]:
    """The files that paths, globs (** included) and directories name, sorted, each once.

    A file that is reached by several links is taken under the first of its names.
    """
    files: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern).expanduser()
        # A path that exists is taken by its letters: "texts[1]" may be a directory.
        inside = escape(str(path)) if path.exists() else str(path)
        inside += "/**/*" if path.is_dir() else ""
        found = {found for found in _glob(inside) if found.is_file()}
        if not found:
            raise UserError(
                f"data.corpus: no file matches {pattern!r} (seen from {Path.cwd()}); give a path, "
                f"a glob or a directory of text, .jsonl or .parquet files, 'stdlib', or "
                f"'hf:NAME' for a Hugging Face dataset"
            )
        files |= found
    # By the file behind the name: a text that is read twice is weighed twice.
    once: dict[Path, Path] = {}
    for path in sorted(files):
        once.setdefault(path.resolve(), path)
    return list(once.values())


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


class FileCorpus:
    """Documents of local files.

    A position is [file number in this order, offset, key or None, documents of the group read].
    The fingerprint changes with the files' names and sizes.
    """

    def __init__(self, files: list[Path], *, text_field: str, separator: str | None) -> None:
        # All sizes at once: an empty corpus is an error now, not after an epoch of nothing.
        sizes = [path.stat().st_size for path in files]
        if not any(sizes):
            more = f" and {len(files) - 1} more" if len(files) > 1 else ""
            raise UserError(f"data.corpus: {files[0]}{more}: empty; give files that hold text")
        self.files, self.text_field, self.separator = files, text_field, separator
        self.sizes = sizes
        self.size: int | None = sum(sizes)
        names = [str(path) for path in files]
        # Names and sizes, not content: reading all of it to resume would take hours.
        listing = repr([names, sizes, text_field, separator]).encode()
        self.fingerprint = blake2b(listing, digest_size=16).hexdigest()

    def read(
        self, *, order: str | None = None, position: Any = None, share: Share = WHOLE
    ) -> Iterator[tuple[Document, Any]]:
        # Sorted, or in the order that the seed's text gives; never by the file system.
        files = list(self.files)
        if order is not None:
            Random(order).shuffle(files)
        groups, group, every, mine = share.among(len(files))
        # Every groups-th file: sorted names often sort by size or date, and blocks would differ.
        files = files[group::groups]
        first, offset, key, count = _place(position)
        for number, path in enumerate(files[first:], start=first):
            for text, where, after, more in self._pieces(path, offset):
                # The first piece's key for all pieces: a document is held out whole, or not.
                own = Document(text, content_key(text, f"{path}, {where}"))
                document = own if key is None else Document(text, key)
                key = document.key if more else None
                if text:
                    # Counted in all parts alike, and empty texts in none: so parts never meet.
                    count += 1
                    if (count - 1) % every == mine:
                        yield document, [number, after, key, count]
            offset, key = 0, None  # the next file from its start

    def done(self, position: Any) -> int:
        """How many of the `size` bytes of the sorted files are behind a position.

        A Parquet file counts when it is left, since its offsets are rows.
        """
        number, offset, *_ = _place(position)
        if number >= len(self.files) or self.files[number].suffix.lower() == ".parquet":
            offset = 0
        return sum(self.sizes[:number]) + (offset[0] if isinstance(offset, tuple) else offset)

    def _pieces(self, path: Path, offset: Offset) -> Found:
        """The file's pieces behind an offset, however often it must be opened again."""
        reader = READERS.get(path.suffix.lower())

        def read() -> Found:
            nonlocal offset
            # By the name's end, as people name files. Anything else is text.
            found = (
                read_text(path, offset, self.separator)
                if reader is None
                else reader(path, offset, self.text_field)
            )
            for piece in found:
                # Kept where the piece ends, so that a reader that is opened again goes on there.
                offset = piece[2]
                yield piece

        return persevere(read, lambda: str(path))


def _place(position: Any) -> tuple[int, Offset, int | None, int]:
    """A position, as far as it can be checked without reading.

    Raises:
        UserError: it is not one of files.
    """
    if position is None:
        return 0, 0, None, 0
    try:
        return POSITION.validate_python(position)
    except ValidationError as error:
        raise UserError(
            f"data.corpus: {shown(position)} is no position in files; the state that holds it is "
            "damaged: use an earlier one"
        ) from error
