"""A very small MQAR comparison, for `osdn demo`: DeltaNet and OSDN, a minute on two cores."""

from pathlib import Path
from typing import Any

from osdn.evals.mqar.grid import PLOT, compare
from osdn.evals.mqar.recipe import MQARRecipe

RECIPE: dict[str, Any] = {
    "mixers": {
        "delta_net": {"mixer": "delta_net", "num_heads": 1, "head_dim": 16},
        "osdn": {"mixer": "osdn", "num_heads": 1, "head_dim": 16},
    },
    "tasks": [{"length": 64, "pairs": 16, "batch_size": 16}],
    "widths": [32],
    "learning_rates": [2.5e-3, 5e-3],
    "seeds": [1, 2],
    "language": {"vocab_size": 64},
    "model": {"layers": ["convolution", "mixer"], "init_std": 0.1},
    "train": {
        "examples": 4096,
        "test_examples": 256,
        "epochs": 5,
        "device": "cpu",
        "processes": 2,
    },
}


def small_comparison(out: Path) -> tuple[dict[str, Any], Path]:
    """Train eight models, two seeds and learning rates each, or what `out` lacks of them.

    Returns:
        The result (see osdn.evals.results; osdn.evals.results.markdown prints its table), and the
        plot's path.
    """
    return compare(MQARRecipe.model_validate(RECIPE), out), out / PLOT
