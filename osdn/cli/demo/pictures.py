"""The page that `osdn demo` ends in, and the same findings in words.

A title says what was found in this run; where the seeds do not decide, it says that.
"""

from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from osdn.cli.demo import adaptation, recall
from osdn.cli.demo.adaptation import Adaptation
from osdn.cli.demo.recall import Recall
from osdn.cli.demo.text import Written

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, THEIRS, GREY = "#d55e00", "#0072b2", "#666666"  # told apart by the colour-blind, too
KINDS = ("#e69f00", "#d55e00", "#cc79a7", "#7f3b08")
LAST = 50  # tokens that count as the end of a sequence


def tell_adaptation(found: Adaptation) -> str:
    """What is left of the error at the end, in one line."""
    left = {name: x[-LAST:].mean().item() for name, x in found.left.items()}
    return (
        f"After {adaptation.TOKENS} tokens OSDN's own write leaves {left['OSDN']:.0%} of a token's "
        f"error, DeltaNet's {left['DeltaNet']:.0%}"
    )


def tell_recall(found: Recall) -> str:
    """What became of the pairs that were given first, in one line."""
    gain, n = found.gain(0), len(found.shares["osdn"])
    if n > 1 and gain.above_zero:
        said = f"OSDN keeps the first pairs: {gain.mean:+.2f} recalled"
    elif n > 1 and gain.high < 0:
        said = f"OSDN recalls fewer of the first pairs: {gain.mean:+.2f}"
    else:
        said = f"These seeds do not decide about the first pairs: {gain.mean:+.2f} recalled"
    return f"{said} [{gain.low:+.2f}, {gain.high:+.2f}], {n} seeds"


def tell_text(found: Written) -> str:
    """What was trained for how long, in one line."""
    result = found.result
    bits = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.2f} bits a byte"
    return (
        f"Trained from nothing in {found.minutes:.1f} minutes ({result.parameters:,} parameters, "
        f"{result.steps:,} steps{bits}), a model writes"
    )


def draw(adapted: Adaptation, recalled: Recall, written: Written, path: Path) -> None:
    """All four panels as a PNG."""
    figure = Figure(figsize=(13, 8.6), layout="constrained")
    (steps, errors), (pairs, page) = figure.subplots(2, 2)
    draw_steps(steps, adapted)
    draw_errors(errors, adapted)
    draw_recall(pairs, recalled)
    draw_text(page, written)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def draw_steps(axes: "Axes", found: Adaptation) -> None:
    """d of every feature while one sequence is read, a color a kind of token."""
    path = found.precond[:, 0]  # [T, K] of the first sequence
    n = adaptation.FEATURES
    for kind, (strength, color) in enumerate(zip(adaptation.STRENGTHS, KINDS, strict=True)):
        lines = axes.plot(path[:, n * kind : n * (kind + 1)], color=color, linewidth=1.3)
        lines[0].set_label(f"4 features of tokens written with β = {strength:g}")
    axes.plot([1] * len(path), "--", color=THEIRS, linewidth=2, label="DeltaNet: 1 for all")
    title(axes, "OSDN learns a step for each key feature while it reads")
    axes.set(
        xlabel="tokens read, of four kinds; beta_aware=True, no training", ylabel="d of a feature"
    )
    finish(axes)


def draw_errors(axes: "Axes", found: Adaptation) -> None:
    """The share of its error that a token's own write leaves: the mean and all sequences' range."""
    window = LAST
    for name, color in (("DeltaNet", THEIRS), ("OSDN", OURS)):
        smooth = found.left[name].unfold(0, window, 1).mean(-1)  # [T - window + 1, N]
        x = range(window, len(smooth) + window)
        axes.plot(x, smooth.mean(1), color=color, linewidth=2.2, label=name)
        axes.fill_between(x, smooth.amin(1), smooth.amax(1), color=color, alpha=0.18, linewidth=0)
    title(axes, tell_adaptation(found))
    axes.set(
        xlabel=f"tokens read (mean of {window}; band: {adaptation.SEQUENCES} sequences)",
        ylabel="error left by a token's own write",
        ylim=(0, None),
    )
    finish(axes)


def draw_recall(axes: "Axes", found: Recall) -> None:
    """The share recalled by quarter of the pairs, with the interval of the difference."""
    n = recall.PAIRS // 4
    places = [f"{i + 1}–{i + n}" for i in range(0, recall.PAIRS, n)]
    means = {}
    for name, color, marker in (("delta_net", THEIRS, "s"), ("osdn", OURS, "o")):
        by_seed = found.quarters(name)
        means[name] = [recall.interval([one[i] for one in by_seed]).mean for i in range(4)]
        axes.plot(places, means[name], marker=marker, color=color, linewidth=2.2, markersize=7,
                  label=recall.NAMES[name])  # fmt: skip
    for i in range(4):
        gain = found.gain(i)
        base = means["delta_net"][i]
        axes.plot([i, i], [base + gain.low, base + gain.high], color=GREY, linewidth=1.2, zorder=1,
                  label="95% interval of the difference" if i == 0 else None)  # fmt: skip
    title(axes, tell_recall(found))
    axes.set(xlabel="pairs, in the order given", ylabel="share recalled at the end")
    finish(axes)


def draw_text(axes: "Axes", found: Written) -> None:
    """The passage, as text."""
    title(axes, tell_text(found))
    lines = [part for line in found.passage.splitlines() for part in wrap_line(line)]
    text = "\n".join(lines[:24])
    axes.text(0.01, 0.98, text, family="monospace", fontsize=8.5, va="top", parse_math=False)
    axes.set_axis_off()


def wrap_line(line: str, width: int = 78) -> list[str]:
    """A line of code in pieces that fit."""
    return wrap(line, width, drop_whitespace=False, replace_whitespace=False) or [""]


def title(axes: "Axes", finding: str) -> None:
    """A finding above a panel, on as many lines as it needs."""
    axes.set_title("\n".join(wrap(finding, 72)), fontsize=11.5, loc="left")


def finish(axes: Any) -> None:
    """What the panels with axes share."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
