"""Documents to fixed-length rows, and rows to a batch with document boundaries.

Tokens are never mixed across documents: a row lists where its sequences start, and a batch turns
that into `cu_seqlens`. A document that is longer than what is left of a row goes on in the next
row as a new sequence, without the memory of what came before; it begins there with the last
token again, so that every token of every document is predicted exactly once.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from osdn.data.tokenizers import encode_document

IGNORED = -100
Tokens = list[int] | NDArray[Any]


class Documents(Protocol):
    """Training documents without end, as text or as tokens, with a state."""

    def __next__(self) -> str | NDArray[Any]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Row(NamedTuple):
    """Tokens, and the offset of each sequence's first token among them."""

    tokens: list[int]
    starts: list[int]


class Batch(NamedTuple):
    """Rows laid end to end.

    input_ids: [1, T] int64.  labels: [1, T] int64, input_ids with IGNORED at each sequence's
    first token.  cu_seqlens: [N + 1] int32.  targets: how many labels are not IGNORED.
    """

    input_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    targets: int


class _Packer:
    """Fills rows from token lists; `at` tokens of `tokens`, the document under way, are done.

    `at` may be given for the first document, which is not asked for before it is needed.
    """

    def __init__(self, documents: Iterator[Tokens], length: int, at: int = 0) -> None:
        self.documents, self.length, self.at = documents, length, at
        self.tokens: Tokens = []

    def row(self) -> Row:
        """The next row; shorter where the documents end, empty after that."""
        row = Row([], [])
        for tokens, first, last in self._pieces():
            row.starts.append(len(row.tokens))
            piece = tokens[first:last]
            row.tokens.extend(piece if isinstance(piece, list) else piece.tolist())
        return row

    def skip(self) -> None:
        """Pass over a row: no token is copied."""
        for _ in self._pieces():
            pass

    def _pieces(self) -> Iterator[tuple[Tokens, int, int]]:
        """A row's sequences, each as tokens first..last of a document."""
        left = self.length
        while left:
            if not len(self.tokens):
                self.tokens = next(self.documents, [])
                if not len(self.tokens):
                    break
            # `at` is where the document goes on; 0 for a new one.
            tokens, first = self.tokens, self.at
            first = min(first, len(tokens) - 1)  # a state from outside may say anything
            last = min(first + left, len(tokens))
            # Whole rows and no padding: what does not fit goes on in the next row.
            left -= last - first
            if last == len(tokens):
                self.tokens, self.at = [], 0
            else:
                # The last token again: first in the next row it has no label, and none is lost.
                self.at = last - 1
            yield tokens, first, last


def pack(documents: Iterator[Tokens], length: int) -> Iterator[Row]:
    """Rows of `length` tokens (at least 2) from a finite stream; the last may be shorter."""
    packer = _Packer(documents, length)
    while (row := packer.row()).tokens:
        yield row


class TrainingRows:
    """Rows of `length` tokens (at least 2) from the training documents, without end.

    documents: TrainingDocuments, whose texts are encoded here, or ShardDocuments.

    The state is that of the documents plus the number of tokens done in the one under way.
    Restoring it reads nothing before the next row is asked for.
    """

    def __init__(
        self, documents: Documents, tokenizer: PreTrainedTokenizerBase, length: int
    ) -> None:
        self.documents, self.tokenizer, self.length = documents, tokenizer, length
        # The state of before the document: one under way is encoded again on resumption.
        self._before = documents.state_dict()
        self._packer = _Packer(self._encoded(), length)

    def _encoded(self) -> Iterator[Tokens]:
        while True:
            # Before each document is taken, since a state may be asked for while it is under way.
            self._before = self.documents.state_dict()
            document: str | Tokens = next(self.documents)
            if isinstance(document, str):
                document = encode_document(self.tokenizer, document)
            yield document

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        return self._packer.row()

    def skip(self) -> None:
        """Pass over a row."""
        self._packer.skip()

    def state_dict(self) -> dict[str, Any]:
        """Where the next row begins."""
        # Within a document: back to before it, and so many tokens in.
        inside = len(self._packer.tokens) > 0
        documents = self._before if inside else self.documents.state_dict()
        return {"documents": documents, "token": self._packer.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called."""
        self.documents.load_state_dict(state["documents"])
        self._packer = _Packer(self._encoded(), self.length, state["token"])

    def close(self) -> None:
        """Let go of open files."""
        self.documents.close()


def collate(rows: Sequence[Row]) -> Batch:
    """One batch of rows; sequences do not cross from row to row."""
    tokens: list[int] = []
    starts: list[int] = []
    for row in rows:
        # Offsets in the batch, no longer in the row.
        starts.extend(len(tokens) + start for start in row.starts)
        tokens.extend(row.tokens)
    input_ids = torch.from_numpy(np.asarray(tokens, dtype=np.int64))  # 3 times torch.tensor's speed
    labels = input_ids.clone()
    # Nothing comes before a sequence's first token, to predict it from.
    labels[starts] = IGNORED
    cu_seqlens = torch.tensor([*starts, len(tokens)], dtype=torch.int32)
    return Batch(input_ids[None], labels[None], cu_seqlens, len(tokens) - len(starts))
