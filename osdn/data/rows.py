"""A run's rows, dealt to its ranks; and worker processes that make them ahead of time.

**The global order.** Documents are dealt to `lanes` lanes, a number that belongs to the recipe and
not to the machines. Each lane is a `TrainingRows` of its own over its share of the corpus, and
global row i is the next row of lane i mod lanes. Rank r of w gives rows r, r + w, r + 2w, ... of
that order, so that the rows of one optimizer step, over all ranks, are the next `batch_rows` rows
of the global order for every w that divides batch_rows: global row s·batch_rows + j·w + r of step s
is the j-th row that rank r gives in it. lanes = 1 is one stream, in the order of `TrainingRows`.

**What a rank reads.** A rank makes rows of the lanes ≡ r modulo gcd(lanes, w). Where w divides
lanes, nobody else uses these lanes: all text is tokenized once, by one rank. Otherwise the ranks
that share a lane each tokenize all of it (of pre-tokenized shards: pass over it without a look)
and keep every so-manieth row. A lane reads files of its own if the corpus has `lanes` files or
more; of fewer files each is read by lanes/files lanes, parsed in all and tokenized in part. So at
scale: as many lanes as ranks or a multiple, and at least as many files as lanes.
A lane goes through its share again when it has come to its end, and shares of whole files differ
in size, so lanes may be in different epochs; over one epoch of all lanes every document comes once.

**The state** of a rank is that of its lanes; the list of all ranks' states, taken after the same
step, restores any other number of ranks (and workers) to exactly the same rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

from transformers import PreTrainedTokenizerBase

from osdn.data.documents import Corpus, Count, Share, checked
from osdn.data.mixture import MixedDocuments, Mixture, parts_of
from osdn.data.packing import Documents, Row, TrainingRows, pack
from osdn.data.shard_documents import ShardDocuments
from osdn.data.split import TrainingDocuments, held_out_texts
from osdn.data.token_corpus import TokenCorpus
from osdn.data.tokenizers import encode_document
from osdn.errors import UserError
from osdn.system.outside import Outside


@dataclass(frozen=True, kw_only=True)
class RowSource:
    """What decides the global order of rows, and nothing else; it can be sent to a process.

    corpus: text, shards of tokens, or a mixture of these.
    tokenizer: of the text; shards must have been made with it.
    length: tokens in a row.
    fraction: share of documents held out.
    shuffle_bytes: UTF-8 bytes that are shuffled together, over all lanes (shards are shuffled
        shard by shard, whatever this is; of a mixture, so many of each text).
    seed: of the order.
    lanes: see the module's docstring.
    """

    corpus: Corpus | Mixture
    tokenizer: PreTrainedTokenizerBase
    length: int
    fraction: float
    shuffle_bytes: int
    seed: int
    lanes: int = 1

    def __post_init__(self) -> None:
        # At construction: another tokenizer's ids train without an error, and mean nothing.
        for corpus in parts_of(self.corpus):
            if isinstance(corpus, TokenCorpus):
                corpus.check_tokenizer(self.tokenizer)

    def lane(self, index: int) -> TrainingRows:
        """The rows of one lane, from its start."""
        parts = [
            self._documents(corpus, Share(index, self.lanes)) for corpus in parts_of(self.corpus)
        ]
        documents = parts[0]
        if isinstance(self.corpus, Mixture):
            documents = MixedDocuments(self.corpus, parts, self.tokenizer)
        return TrainingRows(documents, self.tokenizer, self.length)

    def _documents(self, corpus: Corpus, share: Share) -> Documents:
        """One corpus's part of a lane."""
        common: dict[str, Any] = {"fraction": self.fraction, "seed": self.seed, "share": share}
        if isinstance(corpus, TokenCorpus):
            return ShardDocuments(corpus, **common)
        # The recipe's memory is of all lanes together.
        block = max(1, self.shuffle_bytes // self.lanes)
        return TrainingDocuments(corpus, shuffle_bytes=block, **common)


def validation_rows(
    corpus: Corpus | Mixture,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    fraction: float,
    limit: int,
) -> tuple[list[Row], int]:
    """The held-out documents in rows of `length` tokens, and the UTF-8 bytes of their text.

    Args:
        corpus: text, shards, or a mixture: its corpora one after the other, each with its share
            of the bytes.
        fraction: the share of documents that is held out; 1 takes all.
        limit: UTF-8 bytes of text. The last text is cut there; a shard's last document is whole.

    Raises:
        UserError: no document is held out, or the shards were made with another tokenizer.
    """
    if isinstance(corpus, Mixture):
        rows, total = list[Row](), 0
        for part, share in zip(corpus.corpora, corpus.shares):
            own, size = validation_rows(
                part, tokenizer, length=length, fraction=fraction, limit=max(4, int(limit * share))
            )
            rows, total = rows + own, total + size
        return rows, total
    if isinstance(corpus, TokenCorpus):
        corpus.check_tokenizer(tokenizer)
        # By the keys in the shards, so that both forms of a text hold out the same documents.
        documents, size = corpus.held_out(fraction=fraction, limit=limit)
        return list(pack(iter(documents), length)), size
    texts = held_out_texts(corpus, fraction=fraction, limit=limit)
    # lazily: pack takes what it needs
    encoded = (encode_document(tokenizer, text) for text in texts)
    return list(pack(encoded, length)), sum(len(text.encode()) for text in texts)


class LanePlace(Outside):
    """Rows of a lane that are done, its documents' state, and tokens done in the next one."""

    lane: Count
    row: Count
    documents: dict[str, Any]
    token: Count


class StreamPlace(Outside):
    """A process's rows: the number of the next one, of how many processes, of how many lanes."""

    next: Count
    world: Count
    of: Count
    lanes: list[LanePlace]


class RankPlace(Outside):
    """What `state_dict` gives."""

    streams: list[StreamPlace]


class RankRows:
    """The rows of rank `rank` of `world`, without end; see the module's docstring.

    Args:
        lane: makes the rows of a lane, given its number.
        lanes: how many there are.
    """

    def __init__(
        self, lane: Callable[[int], TrainingRows], lanes: int, *, rank: int = 0, world: int = 1
    ) -> None:
        if not 0 <= rank < world or lanes < 1:
            raise ValueError(
                f"rank, world, lanes: expected 0 <= rank < world and lanes >= 1, "
                f"got {rank}, {world}, {lanes}"
            )
        self.rank, self.world, self.lanes = rank, world, lanes
        # Nothing is read here: lanes open their files at the first row.
        self.next = rank  # the global number of the next row
        self.owned = range(rank % gcd(lanes, world), lanes, gcd(lanes, world))
        self._lanes = {index: lane(index) for index in self.owned}
        self._done = dict.fromkeys(self._lanes, 0)  # rows of each lane that are behind it

    def __iter__(self) -> "RankRows":
        return self

    def __next__(self) -> Row:
        number, index = divmod(self.next, self.lanes)  # row `number` of lane `index`
        lane = self._lanes[index]
        # Rows of this lane that other ranks give; passed over without copying a token.
        while self._done[index] < number:
            lane.skip()
            self._done[index] += 1
        row = next(lane)
        self._done[index] += 1
        self.next += self.world
        return row

    def lane_state(self, index: int) -> dict[str, Any]:
        """Where lane `index` is."""
        return {"lane": index, "row": self._done[index], **self._lanes[index].state_dict()}

    def state_dict(self) -> dict[str, Any]:
        """Where this rank's next rows are: plain numbers, strings and lists."""
        lanes = [self.lane_state(index) for index in self._lanes]
        stream = {"next": self.next, "world": self.world, "of": self.lanes, "lanes": lanes}
        return {"streams": [stream]}

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from the states that all ranks of a run gave after the same step.

        Nothing is read before the next row is asked for.

        Args:
            states: `state_dict()` of every rank, in any order, of any number of ranks.

        Raises:
            UserError: states are damaged, missing, doubled or not of one step, or the corpus or the
                number of lanes is another.
        """
        # A state is a file's content: it is compared before anything is believed.
        checked(list[RankPlace], list(states))
        streams = [stream for state in states for stream in state["streams"]]
        # The first row that nobody has given. It does not depend on how many ranks gave the others.
        first = check_complete(streams, self.lanes)
        self.next = first + (self.rank - first) % self.world
        saved: dict[int, list[dict[str, Any]]] = {}
        for stream in streams:
            for state in stream["lanes"]:
                saved.setdefault(state["lane"], []).append(state)
        for index, lane in self._lanes.items():
            number = self.next
            # This rank's first row of the lane, from there on.
            while number % self.lanes != index:
                number += self.world
            wanted = number // self.lanes  # its number within the lane
            # Several ranks may have been on the lane. The nearest one behind is the cheapest start.
            behind = (state for state in saved.get(index, []) if state["row"] <= wanted)
            nearest = max(behind, key=lambda state: state["row"], default=None)
            # Each rank had a row of each of its lanes at least once in `world` rows of the lane.
            skipped = self.world + len(streams) + 1
            if nearest is None or wanted - nearest["row"] > skipped:
                raise UserError(
                    f"the checkpoint's place in the data is damaged: no state of lane {index} lies "
                    f"near its row {wanted:,}; move the checkpoint away to resume from the one "
                    "before"
                )
            lane.load_state_dict(nearest)
            self._done[index] = nearest["row"]

    def close(self) -> None:
        """Let go of open files."""
        for lane in self._lanes.values():
            lane.close()


def check_complete(streams: Sequence[dict[str, Any]], lanes: int) -> int:
    """The first global row that none of the streams has given, if they are all there are.

    Raises:
        UserError: they are not, or not of one step, or the number of lanes is another.
    """
    for stream in streams:
        if stream["of"] != lanes:
            raise UserError(
                f"data.lanes: the checkpoint was saved with {stream['of']}, and this run asks for "
                f"{lanes}; set it back, or start a run in a new directory"
            )
    # After one step the ranks' next rows are as many numbers in a row.
    found = sorted(stream["next"] for stream in streams)
    if not found:
        raise UserError("states: expected those of all ranks after the same step, got none")
    worlds = {stream["world"] for stream in streams}
    if worlds != {len(found)} or found != list(range(found[0], found[0] + len(found))):
        raise UserError(
            f"states: expected those of all ranks after the same step, got next rows {found} "
            f"of runs of {sorted(worlds)} ranks and workers"
        )
    return found[0]
