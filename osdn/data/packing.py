"""Documents to fixed-length rows, and rows to a batch with document boundaries.

Tokens are never mixed across documents: a row lists where its sequences start, and a batch turns
that into `cu_seqlens`. A document that is longer than what is left of a row goes on in the next
row as a new sequence, without the memory of what came before; it begins there with the last
token again, so that every token of every document is predicted exactly once.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from osdn.data.split import TrainingDocuments
from osdn.data.tokenizers import encode_document

IGNORED = -100


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
    """Fills rows from token lists; `at` tokens of `tokens`, the document under way, are done."""

    def __init__(self, documents: Iterator[list[int]], length: int) -> None:
        self.documents, self.length = documents, length
        self.tokens: list[int] = []
        self.at = 0

    def row(self) -> Row:
        """The next row; shorter where the documents end, empty after that."""
        row = Row([], [])
        while len(row.tokens) < self.length:
            if not self.tokens:
                self.tokens, self.at = next(self.documents, []), 0
                if not self.tokens:
                    break
            taken = self.tokens[self.at : self.at + self.length - len(row.tokens)]
            row.starts.append(len(row.tokens))
            row.tokens.extend(taken)
            self.at += len(taken)
            if self.at == len(self.tokens):
                self.tokens = []
            else:
                self.at -= 1
        return row


def pack(documents: Iterator[list[int]], length: int) -> Iterator[Row]:
    """Rows of `length` tokens (at least 2) from a finite stream; the last may be shorter."""
    packer = _Packer(documents, length)
    while (row := packer.row()).tokens:
        yield row


class TrainingRows:
    """Rows of `length` tokens (at least 2) from the training documents, without end.

    The state is that of the documents plus the number of tokens done in the one under way.
    """

    def __init__(
        self, documents: TrainingDocuments, tokenizer: PreTrainedTokenizerBase, length: int
    ) -> None:
        self.documents, self.tokenizer, self.length = documents, tokenizer, length
        self._before = documents.state_dict()
        self._packer = _Packer(self._encoded(), length)

    def _encoded(self) -> Iterator[list[int]]:
        while True:
            self._before = self.documents.state_dict()
            yield encode_document(self.tokenizer, next(self.documents))

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        return self._packer.row()

    def state_dict(self) -> dict[str, Any]:
        """Where the next row begins."""
        if self._packer.tokens:
            return {"documents": self._before, "token": self._packer.at}
        return {"documents": self.documents.state_dict(), "token": 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called."""
        self.documents.load_state_dict(state["documents"])
        encoded = self._encoded()
        self._packer = _Packer(encoded, self.length)
        if state["token"]:
            self._packer.tokens, self._packer.at = next(encoded), state["token"]

    def close(self) -> None:
        """Let go of open files."""
        self.documents.close()


def collate(rows: Sequence[Row]) -> Batch:
    """One batch of rows; sequences do not cross from row to row."""
    tokens: list[int] = []
    starts: list[int] = []
    for row in rows:
        starts.extend(len(tokens) + start for start in row.starts)
        tokens.extend(row.tokens)
    input_ids = torch.tensor(tokens)
    labels = input_ids.clone()
    labels[starts] = IGNORED
    cu_seqlens = torch.tensor([*starts, len(tokens)], dtype=torch.int32)
    return Batch(input_ids[None], labels[None], cu_seqlens, len(tokens) - len(starts))
