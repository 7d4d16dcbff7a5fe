"""A run of a few seconds: its recipe, its text, and what of its log must repeat bit for bit."""

import json
import multiprocessing
from pathlib import Path
from random import Random
from typing import Any

from osdn.train import Recipe

WORDS = ["the", "delta", "rule", "writes", "what", "memory", "does", "not", "know", "yet", "ä"]


# Processes are forked from a server that has imported the package and done nothing else, so that
# many can be started, and killed, in a few seconds.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["osdn.train.command", "osdn.ops.compiled"])


def start(recipe: Path, out: Path) -> Any:
    """A process that does what the console command does."""
    line = ["train", str(recipe), "--out", str(out)]
    code = f"import sys; from osdn.cli import main; sys.exit(main({line!r}))"
    process = context.Process(target=exec, args=(code, {}))
    process.start()
    return process


def write_texts(directory: Path, documents: int = 60) -> str:
    """Text files of random words; returns the corpus' name."""
    directory.mkdir(parents=True, exist_ok=True)
    random = Random(0)
    for i in range(documents):
        text = " ".join(random.choices(WORDS, k=random.randint(3, 60)))
        (directory / f"{i:02}.txt").write_text(text, encoding="utf-8")
    return str(directory)


def recipe(corpus: str, **changes: Any) -> Recipe:
    """A model of two layers for 12 steps; `changes` are fields of train."""
    return Recipe.model_validate(fields(corpus, **changes))


def fields(corpus: str, **changes: Any) -> dict[str, Any]:
    """The recipe as plain values."""
    train = {
        "steps": 12,
        "seq_len": 48,
        "rows": 2,
        "batch_rows": 4,
        "device": "cpu",
        "validate_every": 4,
        "checkpoint_every": 2,
        "optimizer": {"lr": 1e-2},
        "schedule": {"warmup_steps": 3},
    }
    return {
        "model": {
            "hidden_size": 32,
            "num_heads": 2,
            "num_hidden_layers": 2,
            "intermediate_size": 48,
            "precond_min": 0.0,
            "precond_max": 2.0,
        },
        "data": {
            "corpus": corpus,
            "validation": 0.2,
            "validation_bytes": 600,
            "shuffle_bytes": 2000,
        },
        "train": {**train, **changes},
        "logging": {"tensorboard": False, "progress": False},
    }


TIMINGS = ("seconds", "tokens_per_s", "peak_memory")


def curve(out: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl without the timings: what must repeat bit for bit."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]
