"""Answer-centred recall: copy a field's value out of a real document (arXiv 2407.05483).

The document is cut to a window centred on the answer; the model continues `{text}. {Key}:`, with
the document given once or twice. A sample counts if its value occurs, ignoring case, in the greedy
continuation up to the first line break. The figures of the harness's own tasks ("upstream") are
another protocol: see osdn.evals.lm.

Beside it, and not part of that protocol: the bits per byte that " value" costs after the prompt,
which tells models apart before the first of them says a value whole.
"""

import argparse
import re
from collections import Counter
from math import log
from typing import Any

from osdn.errors import UserError
from osdn.evals.models import LanguageModel
from osdn.evals.recall_data import HUB_SETS, read_samples
from osdn.evals.results import make_result, score

MAX_NEW_TOKENS = 48
UPSTREAM = {"fda": "fda", "swde": "swde", "squad": "squad_completion"}  # tasks of the harness


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The set and the protocol."""
    parser.add_argument(
        "--data",
        required=True,
        help=f"{', '.join(HUB_SETS)}, or a .jsonl file with the fields text, key and value "
        "(osdn eval build-recall makes one)",
    )
    parser.add_argument(
        "--protocol",
        choices=["answer-centred", "upstream"],
        default="answer-centred",
        help="upstream: the lm-evaluation-harness task of fda, swde or squad",
    )
    parser.add_argument(
        "--window", type=int, default=2000, help="tokens of a document and its answer (2000)"
    )
    parser.add_argument(
        "--answer", type=int, default=50, help="tokens of the window left to the answer (50)"
    )
    parser.add_argument(
        "--cloze", action="store_true", help="the text ends in its own question, as squad's does"
    )
    parser.add_argument("--limit", type=int, help="samples at most (default: all)")


def contains(value: str, continuation: str) -> bool:
    """Whether the value occurs in the continuation, ignoring case."""
    return value.strip().lower() in continuation.lower()


def plan(args: argparse.Namespace, model: LanguageModel) -> tuple[dict[str, Any], list[dict]]:
    """(protocol, items) of this evaluation, every sample once and twice, short prompts first."""
    if args.window <= args.answer:
        raise UserError(
            f"--window, --answer: expected a window of more tokens than the answer's, got "
            f"{args.window} and {args.answer}"
        )
    samples = read_samples(args.data)[: args.limit]
    cloze = args.cloze or args.data == "squad"
    items = []
    for i, sample in enumerate(samples):
        text = window(model, sample, args.window - args.answer, keep_end=cloze)
        for times in ("once", "twice"):
            words = prompt(args.data, sample, text, times, cloze)
            tokens = [*model.start, *model.encode(words)]
            whole = [*model.start, *model.encode(f"{words} {sample['value'].strip()}")]
            longest = max(len(tokens) + MAX_NEW_TOKENS, len(whole))
            model.check_length(longest, f"{args.data}, sample {i}, {times}")
            shared = {"key": sample["key"], "value": sample["value"], "guess": guess(samples, i)}
            item = {"id": f"{i}-{times}", "times": times, "tokens": tokens, "whole": whole}
            items.append({**item, **shared})
    items.sort(key=lambda item: len(item["tokens"]))
    protocol = {"protocol": "answer-centred", "cloze": cloze, "max_new_tokens": MAX_NEW_TOKENS}
    protocol["nats"] = "of ' value'"
    protocol["unanswerable"] = sum(not answerable(model, sample) for sample in samples)
    names = ("data", "window", "answer", "limit")
    return protocol | {name: getattr(args, name) for name in names}, items


def window(model: LanguageModel, sample: dict[str, str], size: int, *, keep_end: bool) -> str:
    """At most `size` tokens of the document, around the first occurrence of its value.

    keep_end: the last `size` tokens instead, where the question stands.
    """
    text, value = sample["text"].strip(), sample["value"].strip()
    tokens = model.encode(text)
    if len(tokens) <= size:
        return text
    if keep_end:
        return model.decode(tokens[-size:])
    found = find(value, text)
    at = found.start() if found else 0
    first = len(model.encode(text[:at]))
    last = first + len(model.encode(found.group() if found else ""))
    start = min(max(0, (first + last - size) // 2), len(tokens) - size)
    return model.decode(tokens[start : start + size])


def find(value: str, text: str) -> re.Match[str] | None:
    """The first occurrence of the value, ignoring case."""
    return re.search(re.escape(value), text, re.IGNORECASE)


def answerable(model: LanguageModel, sample: dict[str, str]) -> bool:
    """Whether the value is in the document, on one line, and no longer than an answer may be."""
    value = sample["value"].strip()
    there = find(value, sample["text"]) is not None
    return there and "\n" not in value and len(model.encode(f" {value}")) <= MAX_NEW_TOKENS


def common(a: list[int], b: list[int]) -> int:
    """The tokens that two sequences begin with alike: where a tokenizer joins the last of a prompt
    with what follows, the answer begins before the prompt's end.
    """
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def prompt(data: str, sample: dict[str, str], text: str, times: str, cloze: bool) -> str:
    """What the model continues."""
    if cloze:
        return text if times == "once" else f"{text} {text}"
    key = sample["key"].strip()
    key = key[:1].upper() + key[1:]
    if times == "once":
        return f"{text}. {key}:"
    opening = f"Information about {key}. " if data == "fda" else ""
    return f"{opening}{text}. {text}. {key}:"


def guess(samples: list[dict[str, str]], i: int) -> str:
    """What a guesser says who sees only the key: the most frequent value of the training side.

    Where the set has no training side it is the most frequent value of the same key in the other
    samples, "" if there is none.
    """
    if "guess" in samples[i]:
        return samples[i]["guess"]
    key = samples[i]["key"]
    others = Counter(s["value"] for j, s in enumerate(samples) if j != i and s["key"] == key)
    return others.most_common(1)[0][0] if others else ""


def answer(
    model: LanguageModel, items: list[dict[str, Any]], protocol: dict[str, Any]
) -> list[dict[str, Any]]:
    """Continue a batch of prompts and look for the values; measure what the values cost there."""
    prompts = [item["tokens"] for item in items]
    texts = model.continue_line(prompts, max_new_tokens=protocol["max_new_tokens"])
    starts = [max(1, common(item["tokens"], item["whole"])) for item in items]
    nats = model.nats([item["whole"] for item in items], starts)
    return [
        {
            "times": item["times"],
            "key": item["key"],
            "value": item["value"],
            "continuation": text,
            "right": contains(item["value"], text),
            "guessed": bool(item["guess"]) and contains(item["value"], item["guess"]),
            "nats": cost,
        }
        for item, text, cost in zip(items, texts, nats)
    ]


def conclude(
    model: LanguageModel, protocol: dict[str, Any], records: list[dict[str, Any]]
) -> dict[str, Any]:
    """The result: the share of right answers once, twice and by the guesser, in all and by key;
    and the bits per byte of the values.
    """
    scores = []
    for times in ("once", "twice"):
        there = [record for record in records if record["times"] == times]
        scores.append(score("contains", [r["right"] for r in there], group=times))
        bits = [r["nats"] / log(2) for r in there]
        sizes = [len(f" {r['value'].strip()}".encode()) for r in there]
        scores.append(score("bits per byte of the value", bits, sizes, group=times))
    scores.append(score("contains", [r["guessed"] for r in there], group="guesser"))
    rows = []
    for key, count in Counter(record["key"] for record in records).most_common():
        own = [record for record in records if record["key"] == key]
        shares = [
            [record[name] for record in own if record["times"] == times]
            for times, name in (("once", "right"), ("twice", "right"), ("once", "guessed"))
        ]
        rows.append([key, count // 2, *(f"{sum(x) / len(x):.3f}" for x in shares)])
    columns = ["key", "samples", "once", "twice", "guesser"]
    return make_result(
        "recall",
        protocol=protocol,
        model=model.describe(),
        samples=len(records) // 2,
        scores=scores,
        tables=[{"title": "Recall by key (contains)", "columns": columns, "rows": rows}],
    )
