"""Draw the figures of the README and of docs/: `python docs/figures.py`, a minute, no GPU.

    docs/figures/step-per-feature.svg   one constructed sequence, from osdn.ops.reference
    docs/figures/past-length.svg        study/records/language.jsonl.xz
    docs/figures/differences.svg        study/records/language.jsonl.xz
    docs/figures/first-pairs.svg        study/records/mqar_cpu.jsonl.xz

A number stands in a figure only if it is computed here. Titles say the finding.
"""

import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from generate import read  # noqa: E402

from osdn.ops import online_scaled_delta_rule  # noqa: E402
from study.language_report import pooled_result  # noqa: E402
from study.report import mqar_points  # noqa: E402
from study.statistics import best_rate, interval  # noqa: E402

OUT = ROOT / "docs" / "figures"
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#666666"
matplotlib.rcParams.update({
    "svg.hashsalt": "osdn",  # the same bytes on every run
    "svg.fonttype": "path",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
})  # fmt: skip


def save(figure: Figure, name: str) -> None:
    OUT.mkdir(exist_ok=True)
    figure.savefig(OUT / name, metadata={"Date": None}, facecolor="white")
    print(OUT / name)


# --- a step for each feature ----------------------------------------------------------------------

FEATURES, TOKENS, WEAK, STRONG = 16, 256, 0.35, 0.9


def two_kinds_of_keys() -> tuple[Tensor, Tensor]:
    """Unit keys [T, K] and β [T]: half of the tokens use features 1 to 8 and a small β, the others
    features 9 to 16 and a large one, in random order."""
    draw = torch.Generator().manual_seed(0)
    weak = torch.rand(TOKENS, generator=draw) < 0.5
    k = torch.randn(TOKENS, FEATURES, dtype=torch.float64, generator=draw)
    lower = torch.arange(FEATURES) < FEATURES // 2
    k = torch.where(lower == weak[:, None], k, 0)
    return k / k.norm(dim=-1, keepdim=True), torch.where(weak, WEAK, STRONG).double()


def own_path(k: Tensor, beta: Tensor) -> Tensor:
    """d_t [T, K] by the library's definition: η = 1, γ = 1, no box, beta_aware, d_1 = 1."""
    d, path = torch.ones(1, 1, FEATURES, dtype=k.dtype), []
    for k_t, beta_t in zip(k[:, None, None, None], beta[:, None, None, None]):
        path.append(d[0, 0])
        none = torch.zeros(1, 1, 1, 1, dtype=k.dtype)
        _, _, d = online_scaled_delta_rule(
            torch.zeros_like(k_t), k_t, none, beta_t, beta_aware=True, initial_precond=d,
            output_final_state=True, backend="reference",
        )  # fmt: skip
    return torch.stack(path)


def one_number(k: Tensor, beta: Tensor) -> Tensor:
    """d_t [T, K] where all features share one number, learned by the same descent."""
    number, path = torch.ones((), dtype=k.dtype), []
    for beta_t in beta:  # unit keys: ⟨d, s⟩ is the number itself
        path.append(number.expand(FEATURES))
        number = number + beta_t * (1 - beta_t * number)
    return torch.stack(path)


def left(d: Tensor, k: Tensor, beta: Tensor) -> Tensor:
    """The share (1 − β⟨d, s⟩)² of a token's squared error that its own write leaves, [T]."""
    return (1 - beta * (d * k * k).sum(-1)).square()


def running(values: Tensor, window: int = 24) -> Tensor:
    """Mean over the last tokens."""
    sums = values.cumsum(0)
    recent = torch.cat([sums[:window], sums[window:] - sums[:-window]])
    return recent / torch.arange(1, len(values) + 1).clamp(max=window)


def step_per_feature() -> None:
    k, beta = two_kinds_of_keys()
    d = own_path(k, beta)
    own, shared = left(d, k, beta), left(one_number(k, beta), k, beta)
    plain = left(torch.ones_like(d), k, beta)
    figure = Figure(figsize=(7.4, 3.1), layout="constrained")
    map_axes, axes = figure.subplots(1, 2, width_ratios=(1, 1.15))
    shown = map_axes.imshow(d.T, aspect="auto", cmap="viridis", vmin=1, vmax=1 / WEAK,
                            origin="lower", extent=(1, TOKENS, 0.5, FEATURES + 0.5))  # fmt: skip
    map_axes.set(xlabel="token", ylabel="key feature")
    map_axes.set_title("OSDN learns a step for every feature", loc="left")
    map_axes.axhline(FEATURES / 2 + 0.5, color="white", linewidth=0.8)
    for y, size in ((4.5, WEAK), (12.5, STRONG)):
        map_axes.text(TOKENS * 0.97, y, f"β = {size}: best step {1 / size:.1f}", color="white",
                      ha="right", va="center", fontsize=9,
                      bbox={"facecolor": "#00000066", "edgecolor": "none", "pad": 2})  # fmt: skip
    figure.colorbar(shown, ax=map_axes, label="d")
    x = range(1, TOKENS + 1)
    for y, label, color in (
        (plain, "DeltaNet: d = 1", GREY),
        (shared, "one learned number", ORANGE),
        (own, "OSDN: one per feature", BLUE),
    ):
        axes.plot(x, running(y), color=color, linewidth=2, label=label)
    axes.set(xlabel="token", ylabel="error left by a write", ylim=(0, 0.6), xlim=(1, TOKENS))
    axes.set_title("so each write leaves less of its error", loc="left")
    axes.legend(frameon=False, loc="upper right", fontsize=9)
    save(figure, "step-per-feature.svg")


# --- the study's language models ------------------------------------------------------------------


def pooled() -> dict:
    with TemporaryDirectory() as directory:
        result = pooled_result(*read("language", "language", Path(directory)))
    assert result
    return result


def past_length() -> None:
    (curve,) = pooled()["curves"]
    figure = Figure(figsize=(6.4, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1, color=GREY, linewidth=1)
    axes.axvspan(0, 1024, color="#00000010", linewidth=0)
    axes.text(560, 1.065, "trained\nlength", ha="center", va="top", color=GREY, fontsize=9)
    for (label, points), color in zip(curve["series"].items(), (ORANGE, BLUE)):
        x, y, low, high = zip(*points)
        middle = [end - 512 for end in x]
        axes.plot(middle, y, color=color, linewidth=2, marker="o", markersize=4, label=name(label))
        axes.fill_between(middle, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set(xlabel="position in the text, tokens", ylabel="perplexity / DeltaNet's",
             xlim=(0, 10240), ylim=(0.88, 1.08))  # fmt: skip
    axes.set_title("Past the trained length, only OSDN with APF beats DeltaNet", loc="left")
    axes.legend(frameon=False, loc="upper right", fontsize=9, ncols=2)
    save(figure, "past-length.svg")


def name(label: str) -> str:
    return {"OSDN": "OSDN (5 pairs)", "OSDN, APF": "OSDN with APF (7 pairs)"}[label]


MEASURES = {
    "bits per byte, validation": "bits per byte, trained length",
    "perplexity, bits per byte": "bits per byte, 10× as long",
    "recall, once, contains": "recall in text",
    "residual ratio, all layers, own": "residual ratio",
}


def differences() -> None:
    (table,) = pooled()["tables"]
    by_name = {row[0]: row for row in table["rows"]}
    figure = Figure(figsize=(6.4, 3.9), layout="constrained")
    panels = figure.subplots(2, 2, sharey=True).flat
    for axes, (measure, shown) in zip(panels, MEASURES.items()):
        for i, (label, color) in enumerate((("OSDN", ORANGE), ("OSDN, APF", BLUE))):
            text = by_name[measure][table["columns"].index(label)].partition(";")[0]
            value, low, high = map(float, re.findall(r"[+-][\d.]+", text))
            axes.plot([low, high], [i, i], color=color, linewidth=2)
            axes.plot(value, i, "o", color=color, markersize=6)
        axes.axvline(0, color=GREY, linewidth=1)
        axes.set_title(shown, fontsize=10)
        axes.set_yticks([0, 1], ["OSDN", "OSDN\nwith APF"])
        axes.set_ylim(1.6, -0.6)
        axes.margins(x=0.15)
        axes.ticklabel_format(axis="x", style="plain")
        axes.locator_params(axis="x", nbins=4)
    figure.suptitle("Less DeltaNet, with 95% intervals over pairs of seeds",
                    fontsize=11, x=0.01, ha="left")  # fmt: skip
    save(figure, "differences.svg")


# --- the first pairs ------------------------------------------------------------------------------

STARTED = 0.4  # runs that have not begun to recall say nothing about which pairs are kept


def first_pairs() -> None:
    with TemporaryDirectory() as directory:
        study, records = read("mqar_cpu", "mqar_cpu", Path(directory))
        ((_, mixers),) = mqar_points(study, records, "by_pair").items()
    figure = Figure(figsize=(6.4, 3.5), layout="constrained")
    axes = figure.subplots()
    for (mixer, shown, color) in (("delta_net", "DeltaNet", GREY), ("osdn", "OSDN", ORANGE),
                                  ("APF", "OSDN with APF", BLUE)):  # fmt: skip
        points = mixers[mixer]
        runs = [one["by_pair"] for one in points[best_rate(points)].values()
                if one["accuracy"] > STARTED]  # fmt: skip
        quarter = len(runs[0]) // 4
        draw_quarters(axes, [[sum(run[i * quarter : (i + 1) * quarter]) / quarter for i in range(4)]
                             for run in runs], f"{shown} ({len(runs)} seeds)", color)  # fmt: skip
    axes.set(ylabel="share recalled", xlim=(-0.3, 3.3), ylim=(0.5, 0.9))
    axes.set_xticks(range(4), ["first quarter\nof the pairs", "second", "third", "last"])
    axes.set_title("DeltaNet forgets the pairs given first; OSDN keeps them", loc="left")
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    save(figure, "first-pairs.svg")


def draw_quarters(axes: Axes, runs: list[list[float]], label: str, color: str) -> None:
    means = [sum(quarter) / len(runs) for quarter in zip(*runs)]
    ends = [interval(list(quarter)) for quarter in zip(*runs)]
    axes.plot(range(4), means, color=color, linewidth=2, marker="o", label=label)
    lows, highs = zip(*(end for end in ends if end))
    axes.fill_between(range(4), lows, highs, color=color, alpha=0.12, linewidth=0)


if __name__ == "__main__":
    step_per_feature()
    past_length()
    differences()
    first_pairs()
