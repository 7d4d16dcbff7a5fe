"""A study small enough for a test: two mixers on MQAR, two language models of bytes."""

import json
from pathlib import Path
from random import Random

import yaml

HANG = 1500  # seconds, many times what a slow machine needs: only to end a test that hangs
WORDS = ("stone", "river", "copper", "lantern", "meadow", "signal", "harbour", "winter", "engine")
MQAR = {
    "mixers": {
        "delta_net": {"mixer": "delta_net", "num_heads": 1, "head_dim": 4},
        "osdn": {"mixer": "osdn", "num_heads": 1, "head_dim": 4},
    },
    "tasks": [
        {"length": 16, "pairs": 2, "batch_size": 8},
        {"length": 16, "pairs": 4, "batch_size": 8},
    ],
    "widths": [8],
    "learning_rates": [5e-3, 1e-2],
    "seeds": [0, 1],
    "language": {"vocab_size": 16},
    "train": {"examples": 32, "test_examples": 16, "epochs": 1},
}
MODEL = {
    "hidden_size": 16,
    "num_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 32,
    "forgetting": "none",  # a continuation begins as exactly the function that it goes on from
    "initializer_range": 0.3,  # keys far above the normalisation's epsilon: of unit length
}


def write_mqar(directory: Path, **changes) -> Path:
    """A study of one grid, 16 runs, with a map."""
    maps = {"all": {"rows": {"4": "grid"}, "labels": [0.5, 1]}}
    study = {"mqar": {"grid": {**MQAR, **changes}}, "maps": maps, "seconds_per_step": 0.001}
    path = directory / "mqar.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


def write_language(directory: Path) -> Path:
    """A study of a DeltaNet trained on as OSDN, with its corpus, recall set and recipe.

    The learning rate of the continuation is as good as nothing: it is the model it starts from.
    """
    random = Random(0)
    lines = []
    for i in range(60):
        words = " ".join(random.choice(WORDS) for _ in range(20))
        number = random.randrange(10**5)
        text = f"Name: item{i}\nSize: {number}\nText: {words}"
        lines.append(json.dumps({"text": text, "key": "Size", "value": str(number)}))
    for name, some in (("train", lines[:50]), ("held", lines[50:])):
        (directory / f"{name}.jsonl").write_text("\n".join(some) + "\n")
    recipe = {
        "model": MODEL,
        "data": {
            "corpus": str(directory / "train.jsonl"),
            "validation": str(directory / "held.jsonl"),
        },
        "train": {
            "steps": 20,
            "seq_len": 64,
            "rows": 2,
            "batch_rows": 2,
            "optimizer": {"lr": 0.02},
            "schedule": {"warmup_steps": 0},
        },
    }
    (directory / "lm.yaml").write_text(yaml.safe_dump(recipe))
    short = ["train.steps=3", "train.optimizer.lr=1e-12"]
    study = {
        "recipe": str(directory / "lm.yaml"),
        "variants": {
            "base": {"overrides": ["model.mixer=delta_net"]},
            "as DeltaNet": {
                "start_from": "base",
                "overrides": ["model.mixer=delta_net", *short],
            },
            "as OSDN": {"start_from": "base", "overrides": short},
        },
        "measured": ["as DeltaNet", "as OSDN"],
        "seeds": [0],
        "seconds": 1,
        "evaluations": {
            task: {"task": task, "options": {"data": str(directory / "held.jsonl"), "limit": 3}}
            for task in ("recall", "perplexity")
        },
    }
    path = directory / "language.yaml"
    path.write_text(yaml.safe_dump({"language": {"upgrade": study}}))
    return path
