"""What corpora of tokens share: `osdn tokenize`'s shards and Megatron's files.

Such a corpus is a list of shards. `open` gives a shard's tokens end to end and an index of its
documents; a shard is the window that is shuffled.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from math import ceil
from random import Random
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from osdn.data.documents import WHOLE, Document, Share
from osdn.data.tokenizers import vocabulary_size
from osdn.errors import UserError

# 16 bytes a document, little-endian everywhere
ENTRY = np.dtype([("key", "<u8"), ("tokens", "<u4"), ("bytes", "<u4")])


class Named(Protocol):
    """A shard: its name orders the shuffling of its documents."""

    @property
    def name(self) -> str: ...


S = TypeVar("S", bound=Named)


class TokenCorpus(ABC, Generic[S]):
    """Documents of tokens in shards.

    source: what the user named, for messages.
    """

    shards: list[S]
    fingerprint: str

    def __init__(self, source: str) -> None:
        self.source = source
        self.size: int | None = None
        self.vocabulary: int | None = None  # known once a tokenizer was compared
        self._checked: set[str] = set()  # shards whose tokens were compared with it

    @abstractmethod
    def open(self, shard: S) -> tuple[NDArray[Any], NDArray[Any]]:
        """(tokens [N], mapped into memory; the index [documents], an array of ENTRY)."""

    def document(self, tokens: NDArray[Any]) -> NDArray[Any]:
        """A document as a row takes it: a begin token, the text's, an end token."""
        return tokens

    def text_bytes(self, tokens: NDArray[Any], entry: Any) -> int:
        """The UTF-8 bytes of a document's text, given its tokens and its ENTRY."""
        return int(entry["bytes"])

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer that is not the one of these tokens, as far as can be known."""
        self.vocabulary = vocabulary_size(tokenizer)

    def outside_vocabulary(self, name: str, tokens: NDArray[Any]) -> str:
        """What is wrong with a shard's tokens, compared once in each process; "" if nothing.

        An id past the embedding would be an IndexError in training, or a device assert.
        """
        if self.vocabulary is None or name in self._checked:
            return ""
        smallest, largest = int(tokens.min()), int(tokens.max())
        if smallest < 0:
            return f"has the token {smallest:,}"
        if largest >= self.vocabulary:
            return f"has the token {largest:,}, and the tokenizer has {self.vocabulary:,}"
        self._checked.add(name)
        return ""

    def read(
        self, *, order: str | None = None, position: Any = None, share: Share = WHOLE
    ) -> Iterator[tuple[Document, Any]]:
        """Refuse, in one line, where text is needed."""
        raise UserError(f"{self.source} holds tokens, and text is needed here; name the text")

    def done(self, position: Any) -> int:
        """As read."""
        raise UserError(f"{self.source} holds tokens, and text is needed here; name the text")

    def held_out(self, *, fraction: float, limit: int) -> tuple[list[NDArray[Any]], int]:
        """Held-out documents from shards in a fixed random order, up to `limit` bytes of text.

        The last one is whole. Returns their tokens and the bytes of their texts.

        Raises:
            UserError: no document is held out.
        """
        documents: list[NDArray[Any]] = []
        size = 0
        # A fixed order: every run of every seed validates on the same documents.
        shards = list(self.shards)
        Random("validation").shuffle(shards)
        for shard in shards:
            tokens, index = self.open(shard)
            ends = np.cumsum(index["tokens"], dtype=np.int64)
            for i in np.flatnonzero(held_out_keys(index["key"], fraction)):
                own = tokens[ends[i] - index["tokens"][i] : ends[i]]
                documents.append(self.document(own))
                size += self.text_bytes(own, index[i])
                if size >= limit:
                    return documents, size
        if not documents:
            raise UserError(
                f"data.validation: no document of {self.source} falls in the held-out "
                f"{fraction:.2%}; raise the fraction, name a corpus of its own, or set 0"
            )
        return documents, size


def held_out_keys(keys: NDArray[Any], fraction: float) -> NDArray[np.bool_]:
    """Which documents osdn.data.split.is_held_out holds out, exactly."""
    # The same comparison in integers: a float64 cannot tell neighbouring keys apart.
    limit = ceil(fraction * 2**64)
    return np.ones(len(keys), bool) if limit >= 2**64 else keys < np.uint64(limit)
