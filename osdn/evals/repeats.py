"""In-context repeats ("AR hits", Zoology, arXiv 2312.04927): loss where the context has the answer.

A token is an AR hit if the pair (token before it, token) has occurred before in the same row and is
rare in the training text. Loss on AR hits is recall as a language model uses it: on any text,
without prompts, and decided long before whole values are copied. The rest of the tokens is measured
beside it.

Rare: at most `rare` times in 30 million tokens of a reference, which is the training text; a
shorter reference is allowed as much less.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from osdn.data import encode_document, open_corpus
from osdn.data.shards import ShardCorpus
from osdn.errors import UserError
from osdn.evals.models import LanguageModel
from osdn.evals.perplexity import add_text, negative_log_likelihood, text_rows
from osdn.evals.results import make_result, score

REFERENCE_TOKENS = 30_000_000
CHUNK = 2**20  # pairs of the reference that are counted at a time
DISTANCES = (16, 64, 256, 1024, 4096)  # between the distances that are reported apart

Codes = NDArray[np.int64]


def pairs(tokens: Sequence[int] | NDArray[Any]) -> Codes:
    """One number for each pair of neighbours (a, b): a · 2³² + b; [T − 1]."""
    x = np.asarray(tokens, dtype=np.int64)
    return x[:-1] << 32 | x[1:]


def distances(codes: Codes) -> NDArray[np.int64]:
    """Tokens since the same pair first occurred in the row; 0 where this is the first time."""
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    return np.arange(len(codes)) - first[inverse]


def count(known: Codes, texts: Iterable[NDArray[Any]], limit: int) -> tuple[NDArray[Any], int]:
    """How often each pair occurs in the first `limit` tokens of the texts, and their tokens.

    known: sorted.
    """
    found, read = np.zeros(len(known), dtype=np.int64), 0
    for text in texts:
        text = text[: limit - read]
        read += len(text)
        for start in range(0, len(text) - 1, CHUNK):
            codes = np.sort(pairs(text[start : start + CHUNK + 1]))
            ends = (np.searchsorted(codes, known, side) for side in ("right", "left"))
            found += np.subtract(*ends)
        if read == limit:
            break
    return found, read


def reference_texts(args: argparse.Namespace, model: LanguageModel) -> Iterator[NDArray[Any]]:
    """The tokens of the reference: shards whole, other text document by document.

    Raises:
        UserError: nothing there, or shards of another tokenizer.
    """
    corpus = open_corpus(args.reference, text_field=args.text_field, separator=args.separator)
    if isinstance(corpus, ShardCorpus):
        corpus.check_tokenizer(model.tokenizer)
        for shard in corpus.shards:
            yield corpus.open(shard)[0]
        return
    for document, _ in corpus.read(order="reference"):
        yield np.array(encode_document(model.tokenizer, document.text))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which text, how far, and what is rare."""
    add_text(parser)
    parser.add_argument(
        "--reference",
        required=True,
        help="training text that says which pairs are rare: shards, or as --data",
    )
    parser.add_argument(
        "--rare",
        type=int,
        default=500,
        help="times at most that a rare pair occurs in 30 million tokens of the reference (500)",
    )


def plan(args: argparse.Namespace, model: LanguageModel) -> tuple[dict[str, Any], list[dict]]:
    """(protocol, items): documents end to end, cut into rows of `length` tokens."""
    longest = 10 * model.trained_length
    length = args.length or min(longest, model.limit or longest)
    bucket = args.bucket or model.trained_length
    if length < 3:
        raise UserError(f"--length: expected at least 3, got {length}")
    model.check_length(length, "--length")
    rows: list[list[int]] = []
    for _, tokens in text_rows(args, model, length, join=True):
        rows.append(tokens)
        if len(rows) == args.limit:
            break
    if not rows:
        raise UserError(f"--data: the text is shorter than one row of {length} tokens")
    coded = [pairs(row) for row in rows]
    known = np.unique(np.concatenate(coded))
    counts, read = count(known, reference_texts(args, model), REFERENCE_TOKENS)
    rare = counts * REFERENCE_TOKENS <= args.rare * read
    items = [
        {
            "id": str(i),
            "tokens": row,
            "distances": (distances(codes) * rare[np.searchsorted(known, codes)]).tolist(),
        }
        for i, (row, codes) in enumerate(zip(rows, coded))
    ]
    names = ("data", "text_field", "separator", "held_out", "limit", "rare")
    protocol = {name: getattr(args, name) for name in names}
    return protocol | {"length": length, "bucket": bucket, "reference_tokens": read}, items


def answer(
    model: LanguageModel, items: list[dict[str, Any]], protocol: dict[str, Any]
) -> list[dict[str, Any]]:
    """Measure rows together: nats and tokens of hits and of the rest in every bucket."""
    losses = negative_log_likelihood(model, [item["tokens"] for item in items]).double().numpy()
    return [
        summarise(loss, np.array(item["distances"]), protocol["bucket"])
        for loss, item in zip(losses, items)
    ]


def summarise(
    loss: NDArray[np.float64], distance: NDArray[np.int64], bucket: int
) -> dict[str, dict[str, list[Any]]]:
    """{"hits", "rest": by position; "distance": hits by distance}, each {"nats", "tokens"}.

    loss, distance: [T − 1], of every predicted token; distance 0 is no hit.
    """
    position = np.arange(len(loss)) // bucket
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


def conclude(
    model: LanguageModel, protocol: dict[str, Any], records: list[dict[str, Any]]
) -> dict[str, Any]:
    """The result: nats a token on hits, on the rest and on all; by position and by distance."""
    buckets, bucket = len(records[0]["hits"]["nats"]), protocol["bucket"]
    for record in records:
        record["all"] = {
            name: np.add(record["hits"][name], record["rest"][name]).tolist()
            for name in ("nats", "tokens")
        }
    groups = {f"first {bucket:,} tokens": [0]}
    if buckets == 1:
        groups = {}
    groups[f"{protocol['length']:,} tokens"] = list(range(buckets))
    names = {"hits": "loss on AR hits", "rest": "loss on the rest", "all": "loss"}
    scores = []
    for group, places in groups.items():
        for part, name in names.items():
            scores.append(ratio(name, records, part, places, group=group))
        hits = [sum(r["hits"]["tokens"][i] for i in places) for r in records]
        tokens = [sum(r["all"]["tokens"][i] for i in places) for r in records]
        scores.append(score("share of AR hits", hits, tokens, group=group))
    spans = [f"{i * bucket + 1:,}–{(i + 1) * bucket:,}" for i in range(buckets)]
    by_position = {part: [ratio("", records, part, [i]) for i in range(buckets)] for part in names}
    rows = [
        [span, *(interval(by_position[part][i]) for part in names)] for i, span in enumerate(spans)
    ]
    edges = [1, *DISTANCES]
    ends = [f"{a:,}–{b - 1:,}" for a, b in zip(edges, DISTANCES)] + [f"{DISTANCES[-1]:,} or more"]
    by_distance = [ratio("", records, "distance", [i]) for i in range(len(edges))]
    far = [
        [end, interval(one), f"{one['tokens']:,}"]
        for end, one in zip(ends, by_distance)
        if one["tokens"]
    ]
    course = [
        [edge, one["value"], one["low"], one["high"]]
        for edge, one in zip(edges, by_distance)
        if one["tokens"]
    ]
    axes = {"x": "end of the position bucket, tokens", "y": "nats a token"}
    curves = [
        {
            "title": f"{name[0].upper()}{name[1:]} by position",
            "series": {name: points(by_position[part], bucket)},
            **axes,
        }
        for part, name in names.items()
        if buckets > 1
    ]
    distance_axes = {"x": "tokens since the pair first occurred, at least", "y": "nats a token"}
    curves.append(
        {
            "title": "Loss on AR hits by distance",
            "series": {names["hits"]: course},
            "log_x": True,
            **distance_axes,
        }
    )
    return make_result(
        "repeats",
        protocol=protocol,
        model=model.describe(),
        samples=len(records),
        scores=[{k: v for k, v in one.items() if k != "tokens"} for one in scores if one["n"]],
        tables=[
            {"title": "Loss by position", "columns": ["positions", *names.values()], "rows": rows},
            {
                "title": "Loss on AR hits by tokens since the pair first occurred",
                "columns": ["tokens", "loss", "AR hits"],
                "rows": far,
            },
        ],
        curves=curves,
    )


def ratio(
    name: str, records: list[dict[str, Any]], part: str, places: list[int], *, group: str = ""
) -> dict[str, Any]:
    """The nats a token of a part of all records, over the buckets `places`, as a score.

    Rows without such a token are left out; "tokens" says how many tokens there are, and where
    there is none the value is not a number.
    """
    nats = [sum(r[part]["nats"][i] for i in places) for r in records]
    tokens = [sum(r[part]["tokens"][i] for i in places) for r in records]
    there = [i for i, size in enumerate(tokens) if size]
    if not there:
        none = float("nan")
        return {"group": group, "name": name, "value": none, "low": none, "high": none, "n": 0,
                "tokens": 0}  # fmt: skip
    one = score(name, [nats[i] for i in there], [tokens[i] for i in there], group=group)
    return {**one, "tokens": sum(tokens)}


def interval(one: dict[str, Any]) -> str:
    """A value with its interval; a dash without one."""
    if not one["n"]:
        return "–"
    return f"{one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"


def points(buckets: list[dict[str, Any]], size: int) -> list[list[float]]:
    """[end of the bucket, value, low, high] of every bucket with a token."""
    return [
        [(i + 1) * size, one["value"], one["low"], one["high"]]
        for i, one in enumerate(buckets)
        if one["n"]
    ]
