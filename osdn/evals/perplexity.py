"""Perplexity by position and by document, past the trained length, in bounded memory."""

import argparse
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from osdn.data import encode_document, open_corpus
from osdn.data.split import is_held_out
from osdn.errors import UserError
from osdn.evals.models import LanguageModel
from osdn.evals.results import make_result, score

PIECE = 1024  # tokens of a forward pass; the cache carries the rest
LN2 = math.log(2)


def add_text(parser: argparse.ArgumentParser) -> None:
    """Which text, as documents; and into how many rows of how many tokens it is cut."""
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        help="'stdlib', 'hf:NAME', or files, globs and directories, as in a training recipe",
    )
    parser.add_argument("--text-field", default="text", help="of .jsonl, .parquet and hub records")
    parser.add_argument("--separator", help="between documents in text files")
    parser.add_argument("--split", default="validation", help="of a hub dataset")
    parser.add_argument(
        "--held-out",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="read only the share of documents that training with data.validation=SHARE holds out "
        "(default: 1, every document)",
    )
    parser.add_argument(
        "--length",
        type=int,
        help="tokens of a row at most (default: 10 times the trained length, as far as the model "
        "can take)",
    )
    parser.add_argument(
        "--bucket", type=int, help="tokens in a position bucket (default: the trained length)"
    )
    parser.add_argument("--limit", type=int, default=16, help="rows at most (default 16)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which text, and how far."""
    add_text(parser)
    parser.add_argument(
        "--join",
        action="store_true",
        help="join documents into rows of exactly --length tokens; else a row is one document",
    )


def plan(args: argparse.Namespace, model: LanguageModel) -> tuple[dict[str, Any], list[dict]]:
    """(protocol, items) of this evaluation."""
    longest = 10 * model.trained_length
    length = args.length or min(longest, model.limit or longest)
    bucket = args.bucket or model.trained_length
    if length < 2 or not 0 < args.held_out <= 1:
        raise UserError(
            f"--length, --held-out: expected at least 2 and a share in (0, 1], got {length} and "
            f"{args.held_out}"
        )
    model.check_length(length, "--length")
    items: list[dict[str, Any]] = []
    for text, tokens in text_rows(args, model, length, join=args.join):
        items.append({"id": str(len(items)), "tokens": tokens, "bytes": len(text.encode())})
        if len(items) == args.limit:
            break
    if not items:
        joined = f"; the text is shorter than one row of {length} tokens" if args.join else ""
        raise UserError(f"--data: no document to measure{joined}")
    names = ("data", "text_field", "separator", "held_out", "join", "limit")
    protocol = {name: getattr(args, name) for name in names}
    return protocol | {"length": length, "bucket": bucket}, items


def text_rows(
    args: argparse.Namespace, model: LanguageModel, length: int, *, join: bool
) -> Iterator[tuple[str, list[int]]]:
    """(text, tokens) of every row; a document longer than `length` is cut there.

    join: documents end to end, cut into rows of exactly `length` tokens.
    """
    names = args.data[0] if len(args.data) == 1 else args.data
    corpus = open_corpus(
        names, text_field=args.text_field, separator=args.separator, split=args.split
    )
    joined: list[int] = []
    for document, _ in corpus.read(order="evaluation"):
        if not is_held_out(document, args.held_out):
            continue
        tokens = encode_document(model.tokenizer, document.text)
        if not join:
            kept = tokens[:length]
            whole = len(kept) == len(tokens)
            yield document.text if whole else model.decode(kept), kept
            continue
        joined += tokens
        while len(joined) >= length:
            row, joined = joined[:length], joined[length:]
            yield model.decode(row), row


@torch.inference_mode()
def negative_log_likelihood(model: LanguageModel, rows: list[list[int]]) -> torch.Tensor:
    """−log p(token t | those before), nats, for t = 1..T−1: [B, T − 1] float32 on the CPU.

    rows: B of one length T.
    """
    ids = torch.tensor(rows, device=model.model.device)
    last = ids.shape[1] - 1
    cache, found = None, []
    for start in range(0, last, PIECE):
        end = min(start + PIECE, last)
        output = model.model(ids[:, start:end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits.float().transpose(1, 2)  # [B, vocabulary, tokens]
        target = ids[:, start + 1 : end + 1]
        found.append(F.cross_entropy(logits, target, reduction="none").cpu())
    return torch.cat(found, 1)


def answer(
    model: LanguageModel, items: list[dict[str, Any]], protocol: dict[str, Any]
) -> list[dict[str, Any]]:
    """Measure rows one after another: nats and tokens in every bucket."""
    records = []
    for item in items:
        parts = negative_log_likelihood(model, [item["tokens"]])[0].double().split(protocol["bucket"])
        records.append(
            {
                "nats": [part.sum().item() for part in parts],
                "tokens": [len(part) for part in parts],
                "bytes": item["bytes"],
            }
        )
    return records


def conclude(
    model: LanguageModel, protocol: dict[str, Any], records: list[dict[str, Any]]
) -> dict[str, Any]:
    """The result: perplexity and bits per byte over all, and perplexity by bucket."""
    nats = [sum(record["nats"]) for record in records]
    scores = [
        score("perplexity per token", nats, [sum(r["tokens"]) for r in records], scale=math.exp),
        score("bits per byte", nats, [r["bytes"] * LN2 for r in records]),
    ]
    bucket, points, rows = protocol["bucket"], [], []
    for i in range(max(len(record["nats"]) for record in records)):
        there = [record for record in records if len(record["nats"]) > i]
        one = score(
            "", [r["nats"][i] for r in there], [r["tokens"][i] for r in there], scale=math.exp
        )
        points.append([(i + 1) * bucket, one["value"], one["low"], one["high"]])
        span = f"{i * bucket + 1:,}–{(i + 1) * bucket:,}"
        tokens = sum(r["tokens"][i] for r in there)
        interval = f"{one['low']:.3f}–{one['high']:.3f}"
        rows.append([span, f"{one['value']:.3f}", interval, one["n"], f"{tokens:,}"])
    columns = ["positions", "perplexity", "95% interval", "rows", "tokens"]
    trained = model.trained_length
    return make_result(
        "perplexity",
        protocol=protocol,
        model=model.describe(),
        samples=len(records),
        scores=scores,
        tables=[{"title": "Perplexity by position", "columns": columns, "rows": rows}],
        curves=[
            {
                "title": f"Perplexity by position (trained at {trained:,} tokens)",
                "x": "end of the position bucket, tokens",
                "y": "perplexity per token",
                "series": {"perplexity": points},
            }
        ],
    )
