"""The pictures of `python -m theory`, one PNG an experiment (Agg, colour-blind-safe)."""

from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from theory.experiments import (
    BOXES,
    CAP,
    DRIFT_ETAS,
    ETAS,
    FEATURES,
    GAMMAS,
    GRADIENT,
    KAPPAS,
    LEARNED,
    NEWTON,
    PANELS,
    SCENES,
    Drift,
    FullBatch,
    TokenLocal,
)

# Okabe and Ito's palette; each line also has its own marker, for print without colour.
COLOURS = ("#000000", "#E69F00", "#D55E00", "#56B4E9", "#0072B2", "#009E73")
MARKERS = ("o", "s", "D", "v", "^", "x")
plt.rcParams.update({"font.size": 11, "axes.grid": True, "grid.alpha": 0.3, "figure.dpi": 110})


def draw_full_batch(result: FullBatch, path: Path) -> None:
    """Iterations to 1e-12 against κ for both kinds of features, and the gaps at κ = 10."""
    figure, axes = plt.subplots(1, 3, figsize=(16, 5.6), layout="constrained")
    methods = (GRADIENT, *LEARNED, NEWTON)
    titles = {
        "aligned": "Σ diagonal: a diagonal comparator suffices",
        "rotated": "Σ rotated: no diagonal suffices",
    }
    for axis, features in zip(axes, FEATURES):
        for method, colour, marker in zip(methods, COLOURS, MARKERS):
            points = [(x, result.steps[features, method, x]) for x in KAPPAS]
            kept = [(x, y) for x, y in points if y is not None]
            axis.loglog(*zip(*kept), color=colour, marker=marker, label=method)
        axis.axhline(CAP, color="grey", linestyle=":", linewidth=1)
        axis.set(title=titles[features], xlabel="condition number κ of Σ", ylim=(0.7, 2e7))
    axes[0].set_ylabel("iterations to a gap of 1e-12")
    axes[0].text(1, CAP * 1.15, f"learned ones stopped at {CAP:,}", color="grey", fontsize=10)
    _draw_gaps(axes[2], result, methods)
    handles, labels = axes[0].get_legend_handles_labels()
    extra, names = axes[2].get_legend_handles_labels()
    figure.legend(
        handles + extra, labels + names, loc="outside lower center", ncols=4, frameon=False
    )
    figure.savefig(path)
    plt.close(figure)


def _draw_gaps(axis: Any, result: FullBatch, methods: tuple[str, ...]) -> None:
    for method, colour, marker in zip(methods[:-1], COLOURS, MARKERS):
        curve = result.curves["aligned", method]
        curve = curve[curve > -150]
        every = max(1, len(curve) // 8)
        axis.plot(curve, color=colour, marker=marker, markevery=every)
    (line,) = axis.plot(range(1, len(result.bound) + 1), result.bound, color="grey", linestyle="--")
    line.set_label("Statement 9's bound, diagonal, step η/L²")
    axis.set(
        title="Σ diagonal, κ = 10", xlabel="iteration", ylabel="log₁₀ of the gap", ylim=(-150, 60)
    )


def draw_token_local(result: TokenLocal, path: Path) -> None:
    """Measured Π x_t² (solid) against Statement 5's bound (dashed), per η."""
    figure, axes = plt.subplots(1, 3, figsize=(16, 5.6), layout="constrained")
    for axis, panel in zip(axes, PANELS):
        for eta, colour, marker in zip(ETAS, COLOURS, MARKERS):
            measured, bound = result.curves[panel, eta]
            t = torch.arange(1, len(measured) + 1)
            axis.plot(t, measured, color=colour, marker=marker, markevery=64, label=f"η = {eta:g}")
            axis.plot(t, bound, color=colour, linestyle="--", linewidth=1.2)
        axis.set(title=panel, xlabel="tokens")
    axes[0].set_ylabel("log₁₀ of the product of residual ratios, β = 1")
    axes[0].plot([], [], color="grey", linestyle="--", label="bound, same η")
    axes[0].legend(loc="lower left")
    figure.savefig(path)
    plt.close(figure)


def draw_drift(result: Drift, path: Path) -> None:
    """Prediction error against the plain delta rule's, over γ, per scene, rule, η and box."""
    figure, axes = plt.subplots(
        2, len(SCENES), figsize=(16, 8), layout="constrained", sharex=True, sharey=True
    )
    positions = range(len(GAMMAS))
    for row, beta_aware in zip(axes, (False, True)):
        for scene, axis in enumerate(row):
            for eta, colour, marker in zip(DRIFT_ETAS, COLOURS[1:], MARKERS[1:]):
                for box in BOXES:
                    y = result.error[eta, box, beta_aware][scene]
                    style = {"linestyle": "-" if box is None else "--", "marker": marker}
                    name = f"η = {eta:g}, " + (
                        "no box" if box is None else f"box [{box[0]:g}, {box[1]:g}]"
                    )
                    style["markerfacecolor"] = colour if box is None else "white"
                    axis.plot(positions, y, color=colour, label=name, **style)
            axis.axhline(1, color="black", linewidth=1)
            axis.set_yscale("log")
            axis.set_yticks([1, 2, 5, 10], ["1", "2", "5", "10"])
            axis.minorticks_off()
            axis.set_xticks(positions, [f"{gamma:g}" for gamma in GAMMAS])
            if not beta_aware:
                axis.set_title(SCENES[scene])
            else:
                axis.set_xlabel("retention γ")
        row[0].set_ylabel(("β-aware" if beta_aware else "b = 1") + ": error / delta rule's")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path)
    plt.close(figure)
