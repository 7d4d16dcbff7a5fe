"""What a corpus is: documents, parts of a corpus, and positions in it.

A corpus has a `fingerprint` (a string that changes when its files do) and

    read(order=..., position=..., share=...) -> iterator of (Document, position after it)

`order` seeds the permutation of the files (None: sorted by name). `position` is what an earlier
reading with the same order and share gave; the reading resumes after it. A position is a list or
dictionary of plain numbers and strings. Only the document being read is held in memory.

`share` is one of n parts that make up the corpus. With n files or more, each part reads its own
files. Otherwise the files fall into as many groups as the largest divisor of n allows; the parts of
a group all read it, and each keeps every n-th document.
"""

from collections.abc import Iterator
from hashlib import blake2b
from typing import Annotated, Any, NamedTuple, Protocol

from pydantic import Field, TypeAdapter, ValidationError

from osdn.errors import UserError
from osdn.system.outside import Outside, shown

# Epochs in a row without a document of a share, which has other files in each epoch.
EMPTY_EPOCHS = 20


class Document(NamedTuple):
    """One text, and the 64-bit hash of its content, which decides its side of the split."""

    text: str
    key: int


class Share(NamedTuple):
    """Part `part` of `of` parts of a corpus, counted from 0."""

    part: int
    of: int

    def among(self, files: int) -> tuple[int, int, int, int]:
        """(groups, this part's group, parts in a group, this part's number in it)."""
        # A divisor, so that all groups have equally many parts.
        groups = max(d for d in range(1, self.of + 1) if self.of % d == 0 and d <= max(files, 1))
        return groups, self.part % groups, self.of // groups, self.part // groups


WHOLE = Share(0, 1)


Count = Annotated[int, Field(ge=0, lt=2**63)]
Key = Annotated[int, Field(ge=0, lt=2**64)]  # of a document: see content_key


class Place(Outside):
    """The state of an endless reading of a corpus."""

    fingerprint: str
    epoch: Count
    done: Count


class BlockPlace(Place):
    """Of text: the block of documents in the epoch, and the corpus's position where it began."""

    block: Count
    position: Any


class ShardPlace(Place):
    """Of shards: the number of the shard in the epoch."""

    shard: Count


def checked(schema: Any, state: Any) -> Any:
    """A part of a saved state as plain values, after comparison with its schema.

    Raises:
        UserError: it is not what a run saves.
    """
    try:
        TypeAdapter(schema).validate_python(state, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"the checkpoint's place in the data is damaged: {where}: {first['msg']}, got "
            f"{shown(first['input'])}; move the checkpoint away to resume from the one before"
        ) from error
    return state


class Corpus(Protocol):
    """See the module's docstring."""

    fingerprint: str
    size: int | None  # bytes to read, where that is known

    def read(
        self, *, order: str | None = None, position: Any = None, share: Share = WHOLE
    ) -> Iterator[tuple[Document, Any]]: ...

    def done(self, position: Any) -> int: ...


def content_key(text: str, where: str) -> int:
    """64 bits of a hash of the text: equal texts have equal keys, in every corpus and order."""
    try:
        data = text.encode()
    # Here, since every text comes by: later it would fail inside a tokenizer.
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise UserError(
            f"data.corpus: {where}: not Unicode text: a lone surrogate at character {error.start}"
        ) from error
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")
