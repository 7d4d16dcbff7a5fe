"""Several corpora in shares of the tokens."""

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from osdn.data.documents import Corpus, Count, checked
from osdn.data.packing import Documents
from osdn.data.tokenizers import encode_document
from osdn.errors import UserError
from osdn.system.outside import Outside


class Mixture:
    """Corpora, each with its share of the training tokens.

    Args:
        corpora: by the names that the recipe gives them.
        weights: by name, positive; the shares are weights / their sum.
    """

    def __init__(self, corpora: Mapping[str, Corpus], weights: Mapping[str, float]) -> None:
        total = sum(weights.values())
        self.names = sorted(corpora)  # the order in a recipe changes nothing
        self.corpora = [corpora[name] for name in self.names]
        self.shares = [weights[name] / total for name in self.names]
        listing = [[c.fingerprint, s] for c, s in zip(self.corpora, self.shares)]
        self.fingerprint = blake2b(repr(listing).encode(), digest_size=16).hexdigest()


def parts_of(corpus: Corpus | Mixture) -> list[Corpus]:
    """A mixture's corpora, or the one."""
    return corpus.corpora if isinstance(corpus, Mixture) else [corpus]


class PartPlace(Outside):
    """Of one corpus of a mixture: tokens that came from it, and its documents' state."""

    tokens: Count
    documents: dict[str, Any]


class MixedPlace(Outside):
    """Of a mixture."""

    fingerprint: str
    parts: list[PartPlace]


class MixedDocuments:
    """The documents of several streams, in turns that keep each at its share of the tokens.

    The next document is of the stream whose tokens, divided by its share, are the fewest; of equal
    ones the first. So no random number is drawn, and no stream is ever ahead of its share by more
    than a document. The state is that of all streams and their tokens so far.

    Args:
        parts: TrainingDocuments, whose texts are encoded here, or ShardDocuments.
    """

    def __init__(
        self, mixture: Mixture, parts: list[Documents], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.mixture, self.parts, self.tokenizer = mixture, parts, tokenizer
        self.tokens = [0] * len(parts)

    def __iter__(self) -> "MixedDocuments":
        return self

    def __next__(self) -> NDArray[Any]:
        behind = [tokens / share for tokens, share in zip(self.tokens, self.mixture.shares)]
        chosen = behind.index(min(behind))
        document = next(self.parts[chosen])
        if isinstance(document, str):
            document = np.array(encode_document(self.tokenizer, document))
        self.tokens[chosen] += len(document)
        return document

    def state_dict(self) -> dict[str, Any]:
        """Where the next document is."""
        parts = [
            {"tokens": tokens, "documents": part.state_dict()}
            for tokens, part in zip(self.tokens, self.parts)
        ]
        return {"fingerprint": self.mixture.fingerprint, "parts": parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called.

        Raises:
            UserError: the state is damaged, or of other corpora or shares.
        """
        checked(MixedPlace, state)
        if len(state["parts"]) != len(self.parts):
            raise _changed()
        for part, saved in zip(self.parts, state["parts"]):
            part.load_state_dict(saved["documents"])  # names a corpus that changed
        if state["fingerprint"] != self.mixture.fingerprint:
            raise _changed()
        self.tokens = [saved["tokens"] for saved in state["parts"]]

    def close(self) -> None:
        """Let go of open files."""
        for part in self.parts:
            part.close()


def _changed() -> UserError:
    return UserError(
        "data.corpus: its corpora or their weights changed since the checkpoint was saved; restore "
        "them, or start a run in a new directory"
    )
