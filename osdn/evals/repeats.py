"""In-context repeats ("AR hits", Zoology, arXiv 2312.04927): loss where the context has the answer.

A token is an AR hit if the pair (token before it, token) has occurred before in the same row and is
rare in the training text. Loss on AR hits is recall as a language model uses it: on any text,
without prompts, and decided long before whole values are copied. The rest of the tokens is measured
beside it.

Rare: at most `rare` times in 30 million tokens of a reference, which is the training text; a
shorter reference is allowed as much less.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, model_validator

from osdn.data import encode_document
from osdn.data.token_corpus import TokenCorpus
from osdn.evals.evaluation import option
from osdn.evals.models import LanguageModel
from osdn.evals.perplexity import TextEvaluation, negative_log_likelihood
from osdn.evals.results import make_result, point, score
from osdn.evals.runner import Record, Sample
from osdn.system.outside import Measure, Outside

REFERENCE_TOKENS = 30_000_000
CHUNK = 2**20  # pairs of the reference that are counted at a time
DISTANCES = (16, 64, 256, 1024, 4096)  # between the distances that are reported apart
NAMES = {"hits": "loss on AR hits", "rest": "loss on the rest", "all": "loss"}

Codes = NDArray[np.int64]


def pairs(tokens: Sequence[int] | NDArray[Any]) -> Codes:
    """One number for each pair of neighbours (a, b): a · 2³² + b; [T − 1]."""
    x = np.asarray(tokens, dtype=np.int64)
    return x[:-1] << 32 | x[1:]  # ids below 2³²: one integer compares as the pair does


def distances(codes: Codes) -> NDArray[np.int64]:
    """Tokens since the same pair first occurred in the row; 0 where this is the first time."""
    # The first place of each pair, then each token's distance to its pair's first.
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    return np.arange(len(codes)) - first[inverse]


def count(known: Codes, texts: Iterable[NDArray[Any]], limit: int) -> tuple[NDArray[Any], int]:
    """How often each pair occurs in the first `limit` tokens of the texts, and their tokens.

    known: sorted.
    """
    found, read = np.zeros(len(known), dtype=np.int64), 0
    for text in texts:
        text = text[: limit - read]  # the last text is cut, so that the limit is exact
        read += len(text)
        for start in range(0, len(text) - 1, CHUNK):
            # Sorted pairs of a piece: two binary searches count each known pair.
            codes = np.sort(pairs(text[start : start + CHUNK + 1]))
            ends = (np.searchsorted(codes, known, side) for side in ("right", "left"))
            found += np.subtract(*ends)
        if read == limit:
            break
    return found, read


def summarise(
    loss: NDArray[np.float64], distance: NDArray[np.int64], bucket: int
) -> dict[str, dict[str, list[Any]]]:
    """{"hits", "rest": by position; "distance": hits by distance}, each {"nats", "tokens"}.

    loss, distance: [T − 1], of every predicted token; distance 0 is no hit.
    """
    position = np.arange(len(loss)) // bucket  # bucket of each predicted token, [T − 1]
    # Bin of its distance; 0 where it is no hit, and not read there.
    apart = np.digitize(distance, DISTANCES)
    hit = distance > 0

    def sums(chosen: NDArray[Any], place: NDArray[Any], size: int) -> dict[str, list[Any]]:
        there = place[chosen]
        return {
            "nats": np.bincount(there, loss[chosen], size).tolist(),
            "tokens": np.bincount(there, minlength=size).tolist(),
        }

    buckets = int(position[-1]) + 1
    return {
        "hits": sums(hit, position, buckets),
        "rest": sums(~hit, position, buckets),
        "distance": sums(hit, apart, len(DISTANCES) + 1),
    }


def ratio(records: list[Record], part: str, places: list[int], *, group: str = "") -> Record:
    """The nats a token of a part of all records, over the buckets `places`, as a score.

    Rows without such a token are left out; where no row has one, "n" is 0 and there is no value.
    """
    nats = [sum(r[part]["nats"][i] for i in places) for r in records]
    tokens = [sum(r[part]["tokens"][i] for i in places) for r in records]
    there = [i for i, size in enumerate(tokens) if size]
    name = NAMES.get(part, part)
    if not there:
        return {"group": group, "name": name, "value": None, "low": None, "high": None, "n": 0}
    return score(name, [nats[i] for i in there], [tokens[i] for i in there], group=group)


def by_position(
    records: list[Record], buckets: int, bucket: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(table of all parts, a curve a part) by position; no curve of a single bucket."""
    found = {part: [ratio(records, part, [i]) for i in range(buckets)] for part in NAMES}
    rows = [
        [f"{i * bucket + 1:,}–{(i + 1) * bucket:,}", *(interval(found[part][i]) for part in NAMES)]
        for i in range(buckets)
    ]
    table = {"title": "Loss by position", "columns": ["positions", *NAMES.values()], "rows": rows}
    ends = [(i + 1) * bucket for i in range(buckets)]
    curves = [
        {
            "title": f"{name[0].upper()}{name[1:]} by position",
            "x": "end of the position bucket, tokens",
            "y": "nats a token",
            "series": {name: points(ends, found[part])},
        }
        for part, name in NAMES.items()
        if buckets > 1
    ]
    return table, curves


def by_distance(records: list[Record]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(table, curve) of the loss on AR hits by the distance to where the pair was first."""
    edges = [1, *DISTANCES]
    found = [ratio(records, "distance", [i]) for i in range(len(edges))]
    ends = [f"{a:,}–{b - 1:,}" for a, b in zip(edges, DISTANCES)] + [f"{DISTANCES[-1]:,} or more"]
    counts = [sum(r["distance"]["tokens"][i] for r in records) for i in range(len(edges))]
    table = {
        "title": "Loss on AR hits by tokens since the pair first occurred",
        "columns": ["tokens", "loss", "AR hits"],
        "rows": [
            [end, interval(one), f"{hits:,}"] for end, one, hits in zip(ends, found, counts) if hits
        ],
    }
    curve = {
        "title": "Loss on AR hits by distance",
        "x": "tokens since the pair first occurred, at least",
        "y": "nats a token",
        "log_x": True,
        "series": {NAMES["hits"]: points(edges, found)},
    }
    return table, curve


def interval(one: Record) -> str:
    """A value with its interval; a dash without one."""
    if not one["n"]:
        return "–"
    return f"{one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"


def points(places: list[int], found: list[Record]) -> list[list[float]]:
    """[place, value, low, high] of every bucket with a token."""
    return [point(place, one) for place, one in zip(places, found) if one["n"]]


class Buckets(Outside):
    """Nats and tokens of some buckets."""

    nats: list[Measure] = Field(min_length=1)
    tokens: list[NonNegativeInt]


class Row(Sample):
    """A record."""

    hits: Buckets
    rest: Buckets
    distance: Buckets

    def lengths(self) -> tuple[int, ...]:
        """Of all parts; by position there are as many of hits as of the rest."""
        parts = (self.hits, self.rest, self.distance)
        return tuple(len(one) for part in parts for one in (part.nats, part.tokens))

    @model_validator(mode="after")
    def _one_each(self) -> Self:
        position, apart = len(self.hits.nats), len(DISTANCES) + 1
        if self.lengths() != (position,) * 4 + (apart,) * 2:
            raise ValueError("expected as many nats as tokens, of hits as of the rest")
        return self


@dataclass(frozen=True, kw_only=True)
class Repeats(TextEvaluation):
    """Nats a token on AR hits and on the rest, by position and by distance."""

    task: ClassVar[str] = "repeats"
    about: ClassVar[str] = "loss on in-context repeats (AR hits), the precise measure of recall"
    batch: ClassVar[int] = 4
    record: ClassVar[type[Sample]] = Row

    reference: str = option("training text that says which pairs are rare: shards, or as data")
    rare: int = option(
        "times at most that a rare pair occurs in 30 million tokens of the reference",
        default=500,
        least=1,
    )

    def items(self, model: LanguageModel) -> tuple[dict[str, Any], list[Record]]:
        """Documents end to end in rows, with each token's distance to where its pair was first."""
        sizes = self.sizes(model)
        rows = [tokens for _, tokens in self.rows(model, sizes["length"], join=True)]
        coded = [pairs(row) for row in rows]
        # Only pairs that occur in the rows are counted in the reference.
        known = np.unique(np.concatenate(coded))
        counts, read = count(known, self.reference_texts(model), REFERENCE_TOKENS)
        # Scaled to the reference's size, in integers.
        rare = counts * REFERENCE_TOKENS <= self.rare * read
        return sizes | {"reference_tokens": read}, [
            {
                "id": str(i),
                "tokens": row,
                # A pair that is not rare has distance 0: it is no hit, however near.
                "distances": (distances(codes) * rare[np.searchsorted(known, codes)]).tolist(),
            }
            for i, (row, codes) in enumerate(zip(rows, coded))
        ]

    def reference_texts(self, model: LanguageModel) -> Iterator[NDArray[Any]]:
        """The tokens of the reference: shards whole, other text document by document.

        Raises:
            UserError: nothing there, or shards of another tokenizer.
        """
        # Shards whole: a pair over a document's border is as rare as any.
        corpus = self.corpus(self.reference)
        if isinstance(corpus, TokenCorpus):
            corpus.check_tokenizer(model.tokenizer)
            for shard in corpus.shards:
                yield corpus.open(shard)[0]
            return
        for document, _ in corpus.read(order="reference"):
            yield np.array(encode_document(model.tokenizer, document.text))

    def answer(
        self, model: LanguageModel, items: list[Record], protocol: dict[str, Any]
    ) -> list[Record]:
        """Measure rows together: nats and tokens of hits and of the rest in every bucket."""
        losses = negative_log_likelihood(model, [item["tokens"] for item in items]).double().numpy()
        return [
            summarise(loss, np.array(item["distances"]), protocol["bucket"])
            for loss, item in zip(losses, items)
        ]

    def conclude(
        self, model: LanguageModel, protocol: dict[str, Any], records: list[Record]
    ) -> dict[str, Any]:
        """The result: nats a token on hits, on the rest and on all; by position and by distance."""
        bucket, length = protocol["bucket"], protocol["length"]
        # "all" is the sum of the two: every predicted token is in one of them.
        records = [
            record
            | {
                "all": {
                    name: np.add(record["hits"][name], record["rest"][name]).tolist()
                    for name in ("nats", "tokens")
                }
            }
            for record in records
        ]
        buckets = len(records[0]["all"]["nats"])
        groups = {f"{length:,} tokens": list(range(buckets))}
        if buckets > 1:
            groups = {f"first {bucket:,} tokens": [0], **groups}
        scores = []
        for group, places in groups.items():
            scores += [ratio(records, part, places, group=group) for part in NAMES]
            hits, tokens = (
                [sum(record[part]["tokens"][i] for i in places) for record in records]
                for part in ("hits", "all")
            )
            scores.append(score("share of AR hits", hits, tokens, group=group))
        position, curves = by_position(records, buckets, bucket)
        distance, course = by_distance(records)
        return make_result(
            "repeats",
            protocol=protocol,
            model=model.describe(),
            samples=len(records),
            scores=[one for one in scores if one["n"]],
            tables=[position, distance],
            curves=[*curves, course],
        )
