"""Names in plots and tables are shown as they are."""

import os

import pytest

from osdn.errors import UserError
from osdn.evals.plots import figure, save
from osdn.evals.results import markdown

NAMES = ["runs/$HOME$/a_b", "_first", "a$\\frac$", "plain"]


def test_names_are_no_formulas_and_none_is_hidden(tmp_path):
    text = {"x": NAMES[0], "y": NAMES[2], "title": NAMES[0]}
    curves = [
        {**text, "series": {name: [[1, 2, 1, 3], [2, 3, 2, 4]] for name in NAMES}, "log_y": True},
        {**text, "series": {name: [0.2, 0.4] for name in NAMES}, "strip": True},
    ]
    maps = [{**text, "columns": NAMES, "rows": NAMES, "values": [[0.5] * 4] * 4}]
    page = figure(curves, maps)
    page.savefig(tmp_path / "plot.png")  # which is when matplotlib reads its formulas
    lines, strip, grid, _ = page.axes
    shown = [
        *([entry.get_text() for entry in lines.get_legend().get_texts()],),
        *([tick.get_text() for tick in axes.get_yticklabels()] for axes in (strip, grid)),
    ]
    for texts in shown:
        assert [text.strip().replace("\\$", "$") for text in texts] == NAMES


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.21, 0.43], {"0.3", "0.4"}),
        ([0.05, 0.9], {"0.1", "0.2", "0.5"}),
        ([2e-5, 0.9], {"0.0001", "0.01"}),
    ],
)
def test_a_logarithmic_axis_has_numbers_that_can_be_read(values, expected):
    points = [[i, value, value, value] for i, value in enumerate(values)]
    curve = {"x": "x", "y": "y", "title": "", "series": {"a": points}, "log_y": True}
    page = figure([curve], [])
    page.draw_without_rendering()
    (axes, *_) = page.axes
    low, high = axes.get_ylim()
    ticks = zip(axes.get_yticks(), axes.get_yticklabels())
    shown = [label.get_text() for at, label in ticks if low <= at <= high]
    assert expected <= set(shown) and len(shown) < 9
    assert not any(label.get_text() for label in axes.get_yticklabels(minor=True))


def test_a_figure_of_differences_is_as_high_as_its_rows_and_holds_its_titles():
    def differences(title, labels):
        series = {x: {"values": [0.1, 0.2], "interval": [0.0, 0.3]} for x in labels}
        return {"title": title, "x": "difference", "differences": True, "series": series}

    long = "ten times, 10,240 tokens, loss on AR hits, less Gated DeltaNet"
    few, many = differences(long, ["a"]), differences("short", [f"v{i}" for i in range(8)])
    page = figure([few, few, many, many], [])
    page.draw_without_rendering()
    ends = [axes.title.get_window_extent() for axes in page.axes]
    assert all(end.x0 >= 0 and end.x1 <= page.bbox.width for end in ends)
    assert ends[0].x1 < ends[1].x0
    heights = [figure([one], []).get_figheight() for one in (few, many)]
    assert heights[1] - heights[0] == pytest.approx(7 * 0.28)  # seven rows more
    head, tail = long.rsplit(" less", 1)
    assert page.axes[0].get_title() == f"{head}\nless{tail}"


@pytest.mark.parametrize(
    ("cell", "shown"), [("a|b", r"a\|b"), ("a\nb\r\nc", "a b c"), (1, "1"), ("", "")]
)
def test_a_cell_is_one_cell_of_one_row(cell, shown):
    table = {"columns": [cell, "y"], "rows": [["x", cell]]}
    assert markdown(table) == f"| {shown} | y |\n| --- | --- |\n| x | {shown} |"


def test_a_full_disk_is_one_line_and_leaves_no_plot(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    curve = {"x": "x", "y": "y", "title": "", "series": {"a": [[1, 2, 1, 3]]}}
    with pytest.raises(UserError, match=r"plot\.png: cannot write: No space left on device"):
        save([curve], [], tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    save([curve], [], tmp_path / "plot.png")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
