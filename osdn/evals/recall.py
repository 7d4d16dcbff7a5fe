"""Answer-centred recall: copy a field's value out of a real document (arXiv 2407.05483).

The document is cut to a window centred on the answer; the model continues `{text}. {Key}:`, with
the document given once or twice. A sample counts if its value occurs, ignoring case, in the greedy
continuation up to the first line break. The figures of the harness's own tasks ("upstream") are
another protocol: see osdn.evals.lm.

Beside it, and not part of that protocol: the bits per byte that " value" costs after the prompt,
which tells models apart before the first of them says a value whole.
"""

import re
from collections import Counter
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any, ClassVar, Literal

from osdn.errors import UserError
from osdn.evals.evaluation import Evaluation, option
from osdn.evals.lm import Harness
from osdn.evals.models import LanguageModel
from osdn.evals.recall_data import HUB_SETS, read_samples
from osdn.evals.results import make_result, score
from osdn.evals.runner import Record, Sample
from osdn.system.outside import Measure

MAX_NEW_TOKENS = 48  # as published
UPSTREAM = {"fda": "fda", "swde": "swde", "squad": "squad_completion"}  # tasks of the harness


def contains(value: str, continuation: str) -> bool:
    """Whether the value occurs in the continuation, ignoring case."""
    return value.strip().lower() in continuation.lower()


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
    # Character offsets to tokens: by encoding what stands before.
    found = find(value, text)
    at = found.start() if found else 0
    first = len(model.encode(text[:at]))
    last = first + len(model.encode(found.group() if found else ""))
    # Centred, but within the document: a value near its end keeps the window whole.
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
    # The text ends in its own question, so nothing is asked after it.
    if cloze:
        return text if times == "once" else f"{text} {text}"
    key = sample["key"].strip()
    key = key[:1].upper() + key[1:]  # the rest as it is: names keep their capitals
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
    # Without the sample itself: its own value would be a sure guess.
    others = Counter(s["value"] for j, s in enumerate(samples) if j != i and s["key"] == key)
    return others.most_common(1)[0][0] if others else ""


class Asked(Sample):
    """A record."""

    times: Literal["once", "twice"]
    key: str
    value: str
    right: bool
    guessed: bool
    nats: Measure


@dataclass(frozen=True, kw_only=True)
class Recall(Evaluation):
    """The share of values copied once and twice, and what they cost in bits per byte."""

    task: ClassVar[str] = "recall"
    about: ClassVar[str] = "copy values out of real documents, given once and twice"
    batch: ClassVar[int] = 8
    record: ClassVar[type[Sample]] = Asked

    data: str = option(
        f"{', '.join(HUB_SETS)}, or a .jsonl file with the fields text, key and value"
    )
    protocol: Literal["answer-centred", "upstream"] = option(
        "upstream: the lm-evaluation-harness task of fda, swde or squad", default="answer-centred"
    )
    window: int = option("tokens of a document and its answer", default=2000, least=1)
    answer_tokens: int = option("tokens of the window left to the answer", default=50, least=1)
    cloze: bool = option("the text ends in its own question, as squad's does", default=False)
    limit: int | None = option("samples at most (default: all)", default=None, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window <= self.answer_tokens:
            raise UserError(
                f"window, answer_tokens: expected a window of more tokens than the answer's, got "
                f"{self.window} and {self.answer_tokens}"
            )
        if self.protocol == "upstream" and self.data not in UPSTREAM:
            raise UserError(
                f"data: the upstream protocol knows {', '.join(UPSTREAM)}, got {self.data}"
            )

    def run(self, model: LanguageModel, out: Path, batch: int) -> dict[str, Any]:
        """As Evaluation.run; the upstream protocol is the harness's."""
        if self.protocol == "upstream":
            return Harness(tasks=UPSTREAM[self.data], limit=self.limit).run(model, out, batch)
        return super().run(model, out, batch)

    def items(self, model: LanguageModel) -> tuple[dict[str, Any], list[Record]]:
        """Every sample once and twice, short prompts first."""
        samples = read_samples(self.data)[: self.limit]
        cloze = self.cloze or self.data == "squad"
        items = []
        for i, sample in enumerate(samples):
            # The answer's tokens are left out of the window's budget, as published.
            text = window(model, sample, self.window - self.answer_tokens, keep_end=cloze)
            for times in ("once", "twice"):
                words = prompt(self.data, sample, text, times, cloze)
                tokens = [*model.start, *model.encode(words)]
                # The prompt with its answer, encoded together: a tokenizer may join the two.
                whole = [*model.start, *model.encode(f"{words} {sample['value'].strip()}")]
                longest = max(len(tokens) + MAX_NEW_TOKENS, len(whole))
                model.check_length(longest, f"{self.data}, sample {i}, {times}")
                shared = {"key": sample["key"], "value": sample["value"]}
                item = {"id": f"{i}-{times}", "times": times, "tokens": tokens, "whole": whole}
                items.append({**item, **shared, "guess": guess(samples, i)})
        # Short ones together, so that a batch has little padding.
        items.sort(key=lambda item: len(item["tokens"]))
        # Counted, and kept in: the share is over all samples.
        unanswerable = sum(not answerable(model, sample) for sample in samples)
        added = {"cloze": cloze, "max_new_tokens": MAX_NEW_TOKENS, "nats": "of ' value'"}
        return added | {"unanswerable": unanswerable}, items

    def answer(
        self, model: LanguageModel, items: list[Record], protocol: dict[str, Any]
    ) -> list[Record]:
        """Continue prompts and look for the values; measure what the values cost there."""
        prompts = [item["tokens"] for item in items]
        texts = model.continue_line(prompts, max_new_tokens=protocol["max_new_tokens"])
        # a first token has nothing before it
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
        self, model: LanguageModel, protocol: dict[str, Any], records: list[Record]
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
        # `there` is the last group; each sample has been guessed once for each.
        scores.append(score("contains", [r["guessed"] for r in there], group="guesser"))
        rows = []
        for key, count in Counter(record["key"] for record in records).most_common():
            own = [record for record in records if record["key"] == key]
            shares = [
                [record[name] for record in own if record["times"] == times]
                for times, name in (("once", "right"), ("twice", "right"), ("once", "guessed"))
            ]
            # Once and twice are two records of a sample.
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
