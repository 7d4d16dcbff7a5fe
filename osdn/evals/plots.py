"""Plots of results: curves with their spread, strips, and heat maps, as PNG files or bytes."""

import io
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from osdn.errors import UserError
from osdn.system.files import write_whole

# Okabe and Ito's palette, told apart with any colour vision.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
MARKERS, LINES = "osD^vP*X", ("-", "--", ":", "-.")  # told apart without colours, too
DPI = 110
TITLE = 56  # characters of a title's line: what fits over a panel at 10 points


def plain(text: Any) -> str:
    """Text that matplotlib draws as it is: no formula between dollars, no label that it hides."""
    shown = str(text).replace("$", r"\$")
    return " " + shown if shown.startswith("_") else shown  # which a legend leaves out


def set_title(axes: Axes, title: Any) -> None:
    """The title over a panel, no wider than it: a long one breaks after its last comma."""
    parts = [plain(title)]
    if len(parts[0]) > TITLE and ", " in parts[0]:
        head, _, tail = parts[0].rpartition(", ")
        parts = [f"{head},", tail]
    axes.set_title("\n".join(textwrap.fill(part, TITLE) for part in parts), fontsize=10)


def set_rows(axes: Axes, labels: list[str]) -> None:
    """One row a label, from the top, at equal distances."""
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)


def draw_curves(axes: Axes, curves: dict[str, Any]) -> None:
    """One entry of a result's `curves`: a line a series, a band from low to high."""
    for i, (label, points) in enumerate(curves["series"].items()):
        # Points carry their interval, and the band shows it.
        x, y, low, high = zip(*points)
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        line, name = LINES[i % len(LINES)], plain(label)
        axes.plot(x, y, line, label=name, color=colour, marker=marker, markersize=5, linewidth=1.6)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    if curves.get("log_x"):
        axes.set_xscale("log")
        # Ticks where something was measured; minor ones would only be powers of ten.
        ticks = sorted({point[0] for points in curves["series"].values() for point in points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        axes.set_xticks([], minor=True)
    if curves.get("log_y"):
        axes.set_yscale("log")
        bottom, top = axes.get_ylim()
        if top < 100 * bottom:  # too few powers of ten to read from
            subs = (1, 1.5, 2, 3, 4, 6, 8) if top < 20 * bottom else (1, 2, 5)
            axes.yaxis.set_major_locator(LogLocator(subs=subs))
            axes.set_yticks([], minor=True)
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel=plain(curves["x"]), ylabel=plain(curves["y"]))
    set_title(axes, curves["title"])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves["series"]) > 6:  # below, where it hides nothing
        axes.legend(
            fontsize=7, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16)
        )
    else:
        axes.legend(fontsize=8, frameon=False)


def draw_strip(axes: Axes, strip: dict[str, Any]) -> None:
    """A strip of a result's `curves`: a row a label, a dot a value in [0, 1], a bar the mean."""
    for i, values in enumerate(strip["series"].values()):
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(values, [i] * len(values), "o", color=colour, alpha=0.6, markersize=5)
        axes.plot([sum(values) / len(values)], [i], "|", color=colour, markersize=14, mew=2.5)
    set_rows(axes, [plain(x) for x in strip["series"]])
    axes.set(xlabel=plain(strip["x"]), xlim=(-0.02, 1.02))
    set_title(axes, strip["title"])
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_differences(axes: Axes, strip: dict[str, Any]) -> None:
    """Differences of a result's `curves`: a row a label, a dot a value, the mean's interval."""
    for i, one in enumerate(strip["series"].values()):
        colour, values = COLOURS[i % len(COLOURS)], one["values"]
        axes.plot(values, [i] * len(values), "o", color=colour, alpha=0.45, markersize=5)
        axes.plot([sum(values) / len(values)], [i], "D", color=colour, markersize=7)
        if one["interval"]:
            axes.plot(one["interval"], [i, i], "-", color=colour, linewidth=2)
    axes.axvline(0, color="#888888", linewidth=1)
    set_rows(axes, [f"{plain(x)}, n={len(one['values'])}" for x, one in strip["series"].items()])
    axes.locator_params(axis="x", nbins=6)
    axes.set(xlabel=plain(strip["x"]))
    set_title(axes, strip["title"])
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_map(axes: Axes, grid: dict[str, Any]) -> None:
    """One entry of a result's `maps`: values in [0, 1] as colours, each also written out."""
    axes.imshow(grid["values"], vmin=0, vmax=1, cmap="cividis", aspect="auto")
    axes.set_xticks(range(len(grid["columns"])), [plain(x) for x in grid["columns"]])
    axes.set_yticks(range(len(grid["rows"])), [plain(x) for x in grid["rows"]])
    axes.set(xlabel=plain(grid["x"]), ylabel=plain(grid["y"]))
    set_title(axes, grid["title"])
    for i, row in enumerate(grid["values"]):
        for j, value in enumerate(row):
            ink = "black" if value > 0.6 else "white"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=8)


def height(entry: dict[str, Any]) -> float:
    """Inches of a panel: a strip's follow its rows."""
    if entry.get("strip") or entry.get("differences"):
        return 1.2 + 0.28 * len(entry["series"])
    return 3.7


def figure(curves: list[dict[str, Any]], maps: list[dict[str, Any]]) -> Figure:
    """All curves, strips and maps side by side, two to a row."""
    entries = [*curves, *maps]
    count = len(entries)
    columns = min(2, count)
    heights = [max(map(height, entries[i : i + columns])) for i in range(0, count, columns)]
    # Not pyplot: it keeps figures, and looks for a display.
    page = Figure(figsize=(5.4 * columns, sum(heights)), layout="constrained", dpi=DPI)
    grid = page.subplots(len(heights), columns, squeeze=False, height_ratios=heights).flatten()
    for axes, entry in zip(grid, entries):
        curve = draw_strip if entry.get("strip") else draw_curves
        curve = draw_differences if entry.get("differences") else curve
        (draw_map if entry in maps else curve)(axes, entry)
    for axes in grid[count:]:
        axes.set_axis_off()
    return page


def save(curves: list[dict[str, Any]], maps: list[dict[str, Any]], path: Path) -> None:
    """Write all curves and maps of a result to one PNG file, whole or not at all.

    Raises:
        UserError: the disk does not take it.
    """
    image = png(curves, maps)
    try:
        write_whole(path, image)
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror or error}; make room") from error


def png(curves: list[dict[str, Any]], maps: list[dict[str, Any]]) -> bytes:
    """All curves and maps as one PNG image."""
    buffer = io.BytesIO()
    figure(curves, maps).savefig(buffer, format="png")
    return buffer.getvalue()
