"""The order in which a run reads the documents of shards."""

from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from osdn.data.documents import EMPTY_EPOCHS, WHOLE, ShardPlace, Share, checked
from osdn.data.token_corpus import TokenCorpus, held_out_keys
from osdn.errors import UserError


class ShardDocuments:
    """The training documents of shards for ever, as tokens; in place of TrainingDocuments.

    Each epoch the shards come in another order, and the documents of a shard are shuffled among
    themselves: one shard is the window, and nothing but its index is held in memory. A share takes
    whole shards where there are enough of them, else every so-manieth document of a shuffled one.
    The state is the epoch, the number of the shard in it and how many of its documents are done.
    """

    def __init__(
        self, corpus: TokenCorpus[Any], *, fraction: float, seed: int, share: Share = WHOLE
    ) -> None:
        self.corpus, self.fraction, self.seed, self.share = corpus, fraction, seed, share
        self.state: dict[str, Any] = {"epoch": 0, "shard": 0, "done": 0}
        self._documents = self._read()

    def __iter__(self) -> "ShardDocuments":
        return self

    def __next__(self) -> NDArray[Any]:
        return next(self._documents)

    def state_dict(self) -> dict[str, Any]:
        """Where the next document is."""
        return {"fingerprint": self.corpus.fingerprint, **self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called.

        Raises:
            UserError: the shards are not those that the state belongs to.
        """
        state = dict(checked(ShardPlace, state))
        if state.pop("fingerprint") != self.corpus.fingerprint:
            raise UserError(
                "data.corpus: its shards are not those that the checkpoint was made with; restore "
                "them, or start a run in a new directory"
            )
        self.state = state
        self._documents = self._read()

    def close(self) -> None:
        """Let go of the mapped files."""
        self._documents = iter(())

    def _read(self) -> Iterator[NDArray[Any]]:
        state = self.state
        # As in FileCorpus.read, with shards for files.
        groups, group, every, mine = self.share.among(len(self.corpus.shards))
        empty = 0
        while True:
            shards = list(self.corpus.shards)
            # A seed by text, so that any epoch's order is made without those before it.
            Random(f"{self.seed}-{state['epoch']}").shuffle(shards)
            found = state["shard"] > 0 or state["done"] > 0
            for shard in shards[group::groups][state["shard"] :]:
                # mapped: only pages that are read take memory
                tokens, index = self.corpus.open(shard)
                # int64: the index's uint32 would overflow past 4 billion tokens.
                ends = np.cumsum(index["tokens"], dtype=np.int64).tolist()
                sizes = index["tokens"].tolist()
                # By key and not by place: a document stays on its side, wherever it is copied to.
                training = ~held_out_keys(index["key"], self.fraction)
                order: list[int] = np.flatnonzero(training).tolist()
                Random(f"{self.seed}-{state['epoch']}-{shard.name}").shuffle(order)
                # Shuffled first, then shared out: the parts of a shard are alike.
                for i in order[mine::every][state["done"] :]:
                    state["done"] += 1
                    found = True  # also where a resumed epoch has given some before
                    yield self.corpus.document(tokens[ends[i] - sizes[i] : ends[i]])
                state.update(shard=state["shard"] + 1, done=0)
            empty = 0 if found else empty + 1
            if empty == EMPTY_EPOCHS:
                raise UserError(
                    f"data.corpus: no training document in {self.corpus.source} for part "
                    f"{self.share.part + 1} of {self.share.of}; hold out less (data.validation), "
                    "lower data.lanes, or tokenize more text"
                )
            state.update(epoch=state["epoch"] + 1, shard=0, done=0)
