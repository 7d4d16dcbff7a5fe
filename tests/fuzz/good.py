"""What evaluations and studies leave, as small as it can be."""

from typing import Any

from osdn.evals.residual_ratio import MEASURES, POSITIONS, SHADOWS

SHARE = {"group": "g", "name": "found", "value": 0.5, "low": 0.1, "high": 0.9, "n": 2}
RESULT: dict[str, Any] = {
    "task": "needle",
    "protocol": {"lengths": [64], "seed": 0},
    "model": {"name": "a <script> | `model`", "parameters": 12},
    "samples": 2,
    "scores": [SHARE, {**SHARE, "group": ""}],
    "tables": [{"title": "t", "columns": ["a", "b"], "rows": [["x|y", 1], [None, 2.5]]}],
    "curves": [
        {"title": "c", "x": "x", "y": "y", "series": {"s": [[1, 2.0, 1.0, 3.0], [2, 3, 2, 4]]}},
        {"title": "d", "x": "x", "strip": True, "series": {"s": [1.0, 2.0]}},
        {"title": "e", "x": "x", "differences": True,
         "series": {"s": {"values": [0.1, 0.2], "interval": [0.0, 0.3]}}},
    ],
    "maps": [{"title": "m", "x": "x", "y": "y", "columns": [1, 2], "rows": [3],
              "values": [[0.5, 1.0]]}],
    "provenance": {"command": "osdn eval needle", "commit": None, "versions": {"torch": "2"},
                   "hardware": {"cpu": "c", "cores": 2, "threads": 1, "gpu": None}, "time": "t"},
}  # fmt: skip

CELL: dict[str, Any] = {
    "cell": {"mixer": {"mixer": "osdn"}, "seed": 0},
    "accuracy": 0.75,
    "by_pair": [0.5, 1.0],
    "steps": 4,
    "diverged": False,
    "parameters": 10,
    "state_size": 20,
}

PLACE = {"seconds": 2.0, "machine": "machine", "processes": 2, "time": "t", "commit": None}
CURVE = {"title": "c", "x": "x", "y": "y", "series": {"s": [[1, 2.0, 1.0, 3.0]]}}
RECORDS: list[dict[str, Any]] = [
    {
        "kind": "mqar",
        "spec": {"mixer": {"mixer": "osdn"}, "task": {"length": 8, "pairs": 2, "batch_size": 4},
                 "width": 16, "learning_rate": 0.01, "seed": 0},
        "outcome": {"accuracy": 0.5, "diverged": False, "state_size": 8, "steps": 4},
        **PLACE,
    },
    {
        "kind": "language",
        "spec": {"phases": [{"data": {"corpus": "c"}, "train": {"seq_len": 8, "batch_rows": 2}}],
                 "evaluations": {"recall": {"task": "recall"}}},
        "outcome": {
            "train": {"loss": 1.5, "bits_per_byte": None, "nonfinite": 0, "validation": [[2, 1.5]]},
            "evaluations": {"recall": {"scores": [SHARE], "curves": [CURVE]}},
            "seconds": {"train": 3.0, "evaluations": 1.0}, "steps": 4, "trained": 4,
        },
        **PLACE,
    },
]  # fmt: skip

ITEMS = [{"id": "0"}, {"id": "1"}]
BUCKETS = {"nats": [1.0, 2.0], "tokens": [2, 3]}
APART = {"nats": [1.0] * 6, "tokens": [1] * 6}
# Of each evaluation: protocol, and two records.
SAMPLES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "needle": (
        {"lengths": [64], "depths": [10]},
        [{"length": 64, "depth": 10, "number": "7", "right": right} for right in (True, False)],
    ),
    "recall": (
        {"limit": 1},
        [{"times": times, "key": "Size", "value": "7 kB", "continuation": "", "right": True,
          "guessed": False, "nats": 2.5} for times in ("once", "twice")],
    ),
    "perplexity": (
        {"bucket": 4},
        [{**BUCKETS, "bytes": 9}, {"nats": [1], "tokens": [4], "bytes": 4}],
    ),
    "repeats": (
        {"bucket": 4, "length": 8},
        [{"hits": BUCKETS, "rest": BUCKETS, "distance": APART}] * 2,
    ),
    "residual-ratio": (
        {"context": 8},
        [{"layers": [{name: [[-1.0] * MEASURES] * POSITIONS for name in SHADOWS}]}] * 2,
    ),
}  # fmt: skip
