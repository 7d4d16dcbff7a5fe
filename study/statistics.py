"""Means, spreads and differences over seeds."""

from math import isfinite
from statistics import NormalDist, mean, median, stdev
from typing import Any

Points = dict[float, dict[int, dict[str, Any]]]  # learning rate -> seed -> outcome
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def student(degrees: int) -> float:
    """The 97.5% quantile of Student's t: from a table below 10 degrees of freedom.

    Beyond, three terms of Fisher's expansion in 1/ν around the normal quantile z, right to 0.001.
    """
    if degrees <= len(STUDENT):
        return STUDENT[degrees - 1]
    z = NormalDist().inv_cdf(0.975)
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )


def best_rate(points: Points) -> float:
    """The learning rate with the highest mean over its seeds, of those with the most seeds."""
    most = max(map(len, points.values()))
    means = {
        lr: mean(one["accuracy"] for one in seeds.values())
        for lr, seeds in points.items()
        if len(seeds) == most
    }
    return max(sorted(means), key=lambda lr: means[lr])


def edge(rate: float, rates: list[float]) -> str:
    """Whether the best rate is the grid's lowest or highest, so that a better one may lie outside.

    "–" inside of the grid, or where the grid has one rate.
    """
    if len(rates) == 1 or min(rates) < rate < max(rates):
        return "–"
    return "lowest" if rate == min(rates) else "highest"


def spread(seeds: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """{"value": mean, "low", "high": the lowest and highest seed, "n": seeds} of the accuracy."""
    values = [one["accuracy"] for one in seeds.values()]
    return {"value": mean(values), "low": min(values), "high": max(values), "n": len(values)}


def interval(values: list[float]) -> tuple[float, float] | None:
    """The 95% interval of the mean by Student's t; None for a single value."""
    if len(values) < 2:
        return None
    half = student(len(values) - 1) * stdev(values) / len(values) ** 0.5
    return mean(values) - half, mean(values) + half


def gains(points: Points, first: Points) -> list[float]:
    """This mixer's accuracies less the first's, each at its own best rate, of the seeds in both."""
    own, other = points[best_rate(points)], first[best_rate(first)]
    both = sorted(own.keys() & other.keys())
    return [own[seed]["accuracy"] - other[seed]["accuracy"] for seed in both]


def signed(values: list[float], digits: str) -> str:
    """The mean of differences with its 95% interval; of one, itself; of none "–".

    digits: a format such as ".3f".
    """
    if not values:
        return "–"
    if (ends := interval(values)) is None:
        return f"{values[0]:+{digits}}"
    return f"{mean(values):+{digits}} [{ends[0]:+{digits}}, {ends[1]:+{digits}}]"


def row(points: Points, at_edge: str, less_first: list[float]) -> list[Any]:
    """State, best rate, edge, mean, spread, median, how many lie below half of it (runs that have
    not started), range, seeds, difference, in how many seeds it is higher, runs that diverged.
    """
    rate = best_rate(points)
    values = [one["accuracy"] for one in points[rate].values()]
    outcomes = [one for seeds in points.values() for one in seeds.values()]
    higher = sum(value > 0 for value in less_first)
    return [
        f"{outcomes[0]['state_size']:,}",
        f"{rate:g}",
        at_edge,
        f"{mean(values):.3f}",
        f"{stdev(values):.3f}" if len(values) > 1 else "–",
        f"{median(values):.3f}",
        sum(value < median(values) / 2 for value in values),
        f"{min(values):.3f} to {max(values):.3f}",
        len(values),
        signed(less_first, ".3f"),
        f"{higher} of {len(less_first)}" if less_first else "–",
        sum(one["diverged"] for one in outcomes),
    ]


def mean_course(runs: list[list[list[float]]]) -> list[list[float]]:
    """[x, mean, lowest, highest] over runs of one course; where one is shorter, of the others.

    Where one is not finite there is no point.
    """
    by_x: dict[float, list[float]] = {}
    for points in runs:
        for x, y, *_ in points:
            by_x.setdefault(x, []).append(y)
    return [
        [x, mean(ys), min(ys), max(ys)] for x, ys in sorted(by_x.items()) if all(map(isfinite, ys))
    ]
