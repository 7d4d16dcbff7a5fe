"""Names in plots and tables are shown as they are."""

import pytest

from osdn.evals.plots import figure
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
    ("cell", "shown"), [("a|b", r"a\|b"), ("a\nb\r\nc", "a b c"), (1, "1"), ("", "")]
)
def test_a_cell_is_one_cell_of_one_row(cell, shown):
    table = {"columns": [cell, "y"], "rows": [["x", cell]]}
    assert markdown(table) == f"| {shown} | y |\n| --- | --- |\n| x | {shown} |"
