"""Perplexity by position and by document, past the trained length, in bounded memory."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator

from osdn.data import encode_document, open_corpus
from osdn.data.corpora import Corpus
from osdn.data.split import is_held_out
from osdn.errors import UserError
from osdn.evals.evaluation import Evaluation, option
from osdn.evals.models import LanguageModel
from osdn.evals.results import exp, make_result, point, score
from osdn.evals.runner import Record, Sample
from osdn.system.outside import Measure

# Bounds the logits: [B, 1024, vocabulary] in place of the whole row's.
PIECE = 1024  # tokens of a forward pass; the cache carries the rest
LN2 = math.log(2)


@dataclass(frozen=True, kw_only=True)
class TextEvaluation(Evaluation):
    """An evaluation of rows of text, which may be longer than those of the training."""

    data: str | tuple[str, ...] = option(
        "'stdlib', 'hf:NAME', or files, globs and directories, as in a training recipe"
    )
    text_field: str = option("of .jsonl, .parquet and hub records", default="text")
    separator: str | None = option("between documents in text files", default=None)
    split: str = option("of a hub dataset", default="validation")
    held_out: float = option(
        "read only the documents that training with data.validation=SHARE holds out", default=1.0
    )
    length: int | None = option(
        "tokens of a row at most (default: 10 times the trained length, as far as the model can "
        "take)",
        default=None,
        least=2,
    )
    bucket: int | None = option(
        "tokens in a position bucket (default: the trained length)", default=None, least=1
    )
    limit: int = option("rows at most", default=16, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.held_out <= 1:
            raise UserError(f"held_out: expected a share in (0, 1], got {self.held_out}")

    def sizes(self, model: LanguageModel) -> dict[str, int]:
        """{"length", "bucket"} for a model.

        Raises:
            UserError: the model cannot take a row of that length.
        """
        longest = 10 * model.trained_length
        length = self.length or min(longest, model.limit or longest)
        model.check_length(length, "length")
        return {"length": length, "bucket": self.bucket or model.trained_length}

    def rows(
        self, model: LanguageModel, length: int, *, join: bool
    ) -> Iterator[tuple[str, list[int]]]:
        """(text, tokens) of at most `limit` rows; a document longer than `length` is cut there.

        join: documents end to end, cut into rows of exactly `length` tokens.

        Raises:
            UserError: there is none.
        """
        rows = list(islice(self._rows(model, length, join), self.limit))
        if not rows:
            joined = f"; the text is shorter than one row of {length} tokens" if join else ""
            raise UserError(f"data: no document to measure{joined}")
        yield from rows

    def _rows(
        self, model: LanguageModel, length: int, join: bool
    ) -> Iterator[tuple[str, list[int]]]:
        joined: list[int] = []
        for document, _ in self.corpus(self.data).read(order="evaluation"):
            # By training's own split; held_out = 1 takes every document.
            if not is_held_out(document, self.held_out):
                continue
            tokens = encode_document(model.tokenizer, document.text)
            if not join:
                kept = tokens[:length]
                # Bits per byte need the bytes of what was measured: of a cut row the decoded text.
                whole = len(kept) == len(tokens)
                yield document.text if whole else model.decode(kept), kept
                continue
            joined += tokens
            while len(joined) >= length:  # what is left at the end is no row, and is dropped
                row, joined = joined[:length], joined[length:]
                yield model.decode(row), row

    def corpus(self, names: str | tuple[str, ...]) -> Corpus:
        """The corpus of that name, or of those names, with this evaluation's fields."""
        if not isinstance(names, str):
            names = names[0] if len(names) == 1 else names
        return open_corpus(
            names if isinstance(names, str) else list(names),
            text_field=self.text_field,
            separator=self.separator,
            split=self.split,
        )


@torch.inference_mode()
def negative_log_likelihood(model: LanguageModel, rows: list[list[int]]) -> torch.Tensor:
    """−log p(token t | those before), nats, for t = 1..T−1: [B, T − 1] float32 on the CPU.

    rows: B of one length T.
    """
    ids = torch.tensor(rows, device=model.model.device)  # [B, T]
    last = ids.shape[1] - 1
    cache, found = None, []
    # The cache carries the memory on, so this equals one pass over the row.
    for start in range(0, last, PIECE):
        end = min(start + PIECE, last)
        output = model.model(ids[:, start:end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits.float().transpose(1, 2)  # [B, vocabulary, tokens]
        target = ids[:, start + 1 : end + 1]  # [B, tokens]
        found.append(F.cross_entropy(logits, target, reduction="none").cpu())
    return torch.cat(found, 1)


class Row(Sample):
    """A record: nats and tokens of every bucket."""

    nats: list[Measure] = Field(min_length=1)
    tokens: list[PositiveInt]
    bytes: PositiveInt

    @model_validator(mode="after")
    def _one_each(self) -> Self:
        if len(self.nats) != len(self.tokens):
            raise ValueError("expected as many nats as tokens")
        return self


@dataclass(frozen=True, kw_only=True)
class Perplexity(TextEvaluation):
    """Perplexity over all, by position bucket, and bits per byte."""

    task: ClassVar[str] = "perplexity"
    about: ClassVar[str] = "by position, past the trained length, and by document"
    record: ClassVar[type[Sample]] = Row

    join: bool = option(
        "join documents into rows of exactly `length` tokens; else a row is one document",
        default=False,
    )

    def items(self, model: LanguageModel) -> tuple[dict[str, Any], list[Record]]:
        """Rows, with the bytes of their text."""
        sizes = self.sizes(model)
        rows = self.rows(model, sizes["length"], join=self.join)
        return sizes, [
            {"id": str(i), "tokens": tokens, "bytes": len(text.encode())}
            for i, (text, tokens) in enumerate(rows)
        ]

    def answer(
        self, model: LanguageModel, items: list[Record], protocol: dict[str, Any]
    ) -> list[Record]:
        """Measure rows one after another: nats and tokens in every bucket."""
        records = []
        for item in items:
            # In float64: sums over thousands of tokens are compared in their fourth digit.
            parts = (
                negative_log_likelihood(model, [item["tokens"]])[0]
                .double()
                .split(protocol["bucket"])
            )
            records.append(
                {
                    "nats": [part.sum().item() for part in parts],
                    "tokens": [len(part) for part in parts],
                    "bytes": item["bytes"],
                }
            )
        return records

    def conclude(
        self, model: LanguageModel, protocol: dict[str, Any], records: list[Record]
    ) -> dict[str, Any]:
        """The result: perplexity and bits per byte over all, and perplexity by bucket."""
        # By row, which the bootstrap draws: tokens of one row are not independent.
        nats = [sum(record["nats"]) for record in records]
        scores = [
            score("perplexity per token", nats, [sum(r["tokens"]) for r in records], scale=exp),
            score("bits per byte", nats, [r["bytes"] * LN2 for r in records]),
        ]
        bucket, points, rows = protocol["bucket"], [], []
        # Rows end at different lengths: a bucket has the rows that reach it.
        for i in range(max(len(record["nats"]) for record in records)):
            there = [record for record in records if len(record["nats"]) > i]
            one = score(
                "", [r["nats"][i] for r in there], [r["tokens"][i] for r in there], scale=exp
            )
            points.append(point((i + 1) * bucket, one))
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
