"""The report puts like beside like, stands alone, and says the same in Markdown."""

import json
import re

import pytest

from osdn.cli.main import main
from osdn.evals.results import make_result, score, write_json


def result(path, name, values, protocol, curve=None, grid=None):
    write_json(
        path / "result.json",
        make_result(
            "recall",
            protocol=protocol,
            model={"name": name},
            samples=len(values),
            scores=[score("contains", values, group="once")],
            tables=[{"title": "By key", "columns": ["key", "n"], "rows": [["a<b", 3]]}],
            curves=curve or [],
            maps=grid or [],
        ),
    )


@pytest.fixture
def runs(tmp_path):
    curve = [{"title": "C", "x": "x", "y": "y", "series": {"s": [[1, 2, 1, 3], [2, 3, 2, 4]]}}]
    grid = [{"title": "M", "x": "x", "y": "y", "columns": [1, 2], "rows": [0], "values": [[0, 1]]}]
    result(tmp_path / "one", "model-one", [1.0, 0.0], {"protocol": "p"}, curve, grid)
    result(tmp_path / "two", "model-two", [1.0, 1.0], {"protocol": "p"}, curve, grid)
    result(tmp_path / "three", "model-three", [0.0, 0.0], {"protocol": "other"})
    return tmp_path


def test_one_protocol_one_table(runs):
    page = runs / "page.html"
    assert main(["report", str(runs), "--out", str(page)]) == 0
    twin = page.with_suffix(".md").read_text()
    assert "| once, contains | 0.5 [0, 1] n=2 | 1 [1, 1] n=2 |" in twin
    assert "| once, contains | 0 [0, 0] n=2 |" in twin
    assert twin.count("## recall (p)") == 1 and twin.count("## recall (other)") == 1
    html = page.read_text()
    for cell in ("0.5 [0, 1] n=2", "1 [1, 1] n=2", "0 [0, 0] n=2", "a&lt;b"):
        assert f"<td>{cell}</td>" in html
    assert "a<b" not in html


def test_the_page_stands_alone_and_is_light(runs):
    page = runs / "page.html"
    main(["report", str(runs / "one"), str(runs / "two"), "--out", str(page)])
    html = page.read_text()
    assert page.stat().st_size < 2_000_000 and html.count("data:image/png;base64,") == 1
    assert not re.search(r"<script|<link|@import|src=\"(?!data:)|https?://", html)
    assert json.loads((runs / "one/result.json").read_text())["provenance"]["time"] in html


def test_a_run_without_a_result_is_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "is the evaluation finished" in error and error.count("\n") == 1
    (tmp_path / "result.json").write_text("{}")
    assert main(["report", str(tmp_path)]) == 1
    assert "not an evaluation's result" in capsys.readouterr().err


def test_the_page_may_not_be_named_as_the_file_beside_it(tmp_path, capsys):
    result(tmp_path, "one", [1.0, 0.0], {"protocol": "p"})
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page.md")]) == 1
    assert "--out: expected the HTML page's name" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()
