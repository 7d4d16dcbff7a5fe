"""Samples come one line at a time, survive a kill, and are never mixed; intervals are right."""

import json
from pathlib import Path

import numpy as np
import pytest

from osdn.errors import UserError
from osdn.evals.perplexity import Perplexity
from osdn.evals.repeats import DISTANCES, Repeats
from osdn.evals.residual_ratio import ResidualRatio
from osdn.evals.results import bootstrap, make_result, read_result, score, write_json
from osdn.evals.runner import SAMPLES, measure

ITEMS = [{"id": str(i)} for i in range(7)]


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    asked = []

    def answer(items):
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.extend(item["id"] for item in items)
        return [{"square": int(item["id"]) ** 2} for item in items]

    options = {"protocol": {"a": 1}, "batch": 2, "name": "test"}
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, ITEMS, answer, **options)
    path = tmp_path / SAMPLES
    assert len(path.read_text().splitlines()) == 5  # the protocol and four samples
    path.write_bytes(path.read_bytes()[:-6])  # as if killed while writing the fourth
    asked[:] = ["again"]
    records = measure(tmp_path, ITEMS, answer, **options)
    assert asked == ["again", "3", "4", "5", "6"]
    assert records == [{"id": str(i), "square": i * i} for i in range(7)]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"protocol": {"a": 1}}, *records]
    assert measure(tmp_path, ITEMS, None, **options) == records  # nothing left to ask


def test_other_protocols_and_empty_sets_are_refused(tmp_path):
    def answer(items):
        return [{} for _ in items]

    measure(tmp_path, ITEMS, answer, protocol={"a": 1, "b": 2}, batch=1, name="test")
    with pytest.raises(UserError, match=r"measured otherwise \(b, c\)"):
        measure(tmp_path, ITEMS, answer, protocol={"a": 1, "c": 2}, batch=1, name="test")
    with pytest.raises(UserError, match="the set is empty"):
        measure(tmp_path, [], answer, protocol={}, batch=1, name="test")
    (tmp_path / SAMPLES).write_text("no json\n")
    with pytest.raises(UserError, match="not a samples file"):
        measure(tmp_path, ITEMS, answer, protocol={}, batch=1, name="test")


def test_the_interval_is_that_of_the_normal_law_for_many_samples():
    x = np.random.default_rng(1).random(2000) < 0.3
    low, high = bootstrap(x)
    half = 1.96 * np.sqrt(x.mean() * (1 - x.mean()) / 2000)
    assert low == pytest.approx(x.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(x.mean() + half, abs=0.1 * half)


def test_a_weighted_score_is_a_ratio_of_sums():
    one = score("x", [1.0, 8.0], [1.0, 2.0], scale=lambda y: 10 * y)
    assert (one["value"], one["low"], one["high"], one["n"]) == (30.0, 10.0, 40.0, 2)


def test_results_say_where_they_come_from(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/lib/osdn/__main__.py", "eval", "recall", "a b"])
    result = make_result("t", protocol={}, model=None, samples=2, scores=[score("s", [0.0, 1.0])])
    write_json(tmp_path / "result.json", result)
    made = read_result(tmp_path)["provenance"]
    assert {"torch", "transformers", "python"} <= set(made["versions"])
    assert made["hardware"]["cores"] >= 1
    if (Path(__file__).parents[2] / ".git").exists():
        assert len(made["commit"].removesuffix("+changes")) == 40
    assert made["command"] == "osdn eval recall 'a b'"
    with pytest.raises(UserError, match="is the evaluation finished"):
        read_result(tmp_path / "other")


HALF = {"nats": [1.0], "tokens": [2]}
WHOLE = {"nats": [1.0] * (len(DISTANCES) + 1), "tokens": [2] * (len(DISTANCES) + 1)}
UNEQUAL = {
    Perplexity: [{"nats": [1.0, 2.0], "tokens": [3], "bytes": 4}],
    Repeats: [
        {"hits": HALF, "rest": HALF, "distance": WHOLE},
        {"hits": WHOLE, "rest": WHOLE, "distance": WHOLE},
    ],
    ResidualRatio: [{"layers": [{"own": [[1.0]]}]}],
}


@pytest.mark.parametrize("kind", UNEQUAL)
def test_samples_whose_lists_do_not_fit_are_refused(kind, tmp_path):
    lines = [{"protocol": {}}, *({"id": str(i), **one} for i, one in enumerate(UNEQUAL[kind]))]
    (tmp_path / SAMPLES).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match="not a samples file") as caught:
        measure(tmp_path, ITEMS, None, protocol={}, batch=1, name="test", schema=kind.record)
    assert "\n" not in str(caught.value)
