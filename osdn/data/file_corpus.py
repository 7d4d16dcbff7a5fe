"""Documents of files: text, JSONL and Parquet."""

from collections.abc import Iterator
from hashlib import blake2b
from random import Random
from typing import Any

from pydantic import TypeAdapter, ValidationError

from osdn.data.documents import WHOLE, Count, Document, Key, Share, content_key
from osdn.data.files import SourceFile
from osdn.data.readers import READERS, Found, Offset, read_text
from osdn.errors import UserError
from osdn.system.outside import shown
from osdn.system.retry import persevere

# What `read` yields. Two offsets: within a record, whose key must then be known.
POSITION = TypeAdapter(tuple[Count, Count | tuple[Count, Count], Key | None, Count])


class FileCorpus:
    """Documents of files.

    A position is [file number in this order, offset, key or None, documents of the group read].
    The fingerprint changes with the files' names and sizes.
    """

    def __init__(self, files: list[SourceFile], *, text_field: str, separator: str | None) -> None:
        # All sizes at once: an empty corpus is an error now, not after an epoch of nothing.
        sizes = [file.size for file in files]
        if not any(sizes):
            more = f" and {len(files) - 1} more" if len(files) > 1 else ""
            raise UserError(f"data.corpus: {files[0]}{more}: empty; give files that hold text")
        self.files, self.text_field, self.separator = files, text_field, separator
        self.sizes = sizes
        self.size: int | None = sum(sizes)
        names = [file.name for file in files]
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

        A Parquet or compressed file counts when it is left, since its offsets are others.
        """
        number, offset, *_ = _place(position)
        file = self.files[number] if number < len(self.files) else None
        if file is None or file.suffix == ".parquet" or file.compression:
            offset = 0
        return sum(self.sizes[:number]) + (offset[0] if isinstance(offset, tuple) else offset)

    def _pieces(self, path: SourceFile, offset: Offset) -> Found:
        """The file's pieces behind an offset, however often it must be opened again."""
        reader = READERS.get(path.suffix)

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
