"""The second part of `osdn demo`: which pairs a full memory still recalls.

Small models with one 16 × 16 memory learn to recall 32 key-value pairs (MQAR), twice as many as
the memory has features. DeltaNet and OSDN start from the same weights and see the same data, seed
by seed. This is the experiment `by_pair` of study/recipes/mqar_cpu.yaml.
"""

from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from osdn.evals.mqar.grid import CELLS, compare, read_outcome
from osdn.evals.mqar.recipe import MQARRecipe

NAMES = {"delta_net": "DeltaNet", "osdn": "OSDN"}
FIRST_SEED = 61  # the study's
PAIRS = 32
RECIPE: dict[str, Any] = {
    "mixers": {name: {"mixer": name, "num_heads": 1, "head_dim": 16} for name in NAMES},
    "tasks": [{"length": 128, "pairs": PAIRS, "batch_size": 16}],
    "widths": [32],
    "learning_rates": [5e-3],
    "language": {"vocab_size": 128},
    "model": {"layers": ["convolution", "mixer"], "init_std": 0.1},
    "train": {
        "examples": 4096,
        "test_examples": 256,
        "epochs": 10,
        "stop_at": 0.99,
        "schedule": {"warmup_steps": 640, "min_ratio": 0.0},
        "device": "cpu",
        "processes": 2,
    },
}
# Student's t, 97.5%, by degrees of freedom from 1 on; 8 seeds have 7.
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)


class Interval(NamedTuple):
    """A mean over seeds with its 95% interval; low and high are the mean's where n = 1."""

    mean: float
    low: float
    high: float

    @property
    def above_zero(self) -> bool:
        return self.low > 0


def interval(values: list[float]) -> Interval:
    """Student's t interval of the mean."""
    middle, n = mean(values), len(values)
    if n < 2:
        return Interval(middle, middle, middle)
    half = QUANTILES[min(n - 1, len(QUANTILES)) - 1] * stdev(values) / n**0.5
    return Interval(middle, middle - half, middle + half)


class Recall(NamedTuple):
    """shares: by model, a list by seed of [PAIRS] shares of right answers by the pair's place."""

    shares: dict[str, list[list[float]]]

    def quarters(self, name: str) -> list[list[float]]:
        """By seed, the mean share of each quarter of the pairs, first to last."""
        n = PAIRS // 4
        return [[mean(one[i : i + n]) for i in range(0, PAIRS, n)] for one in self.shares[name]]

    def gain(self, quarter: int) -> Interval:
        """OSDN's share less DeltaNet's in a quarter, over the seeds."""
        both = zip(self.quarters("osdn"), self.quarters("delta_net"), strict=True)
        return interval([ours[quarter] - theirs[quarter] for ours, theirs in both])


def measure(out: Path, seeds: int) -> Recall:
    """Train the models that `out` lacks, two for each seed."""
    chosen = list(range(FIRST_SEED, FIRST_SEED + seeds))
    recipe = MQARRecipe.model_validate(RECIPE | {"seeds": chosen})
    compare(recipe, out)
    shares: dict[str, list[list[float]]] = {name: [] for name in NAMES}
    for cell in recipe.cells():
        outcome = read_outcome(out / CELLS / cell.file)
        shares[cell.mixer].append(outcome["by_pair"])
    return Recall(shares)
