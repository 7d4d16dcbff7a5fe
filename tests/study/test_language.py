"""Language models in a study: a beginning is trained once, a signal leaves a checkpoint."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from safetensors.torch import load_file

from osdn.errors import UserError
from osdn.evals.plots import figure
from study.__main__ import main
from study.language import directory_of, perform, steps_left
from study.language_report import _cell, _curves, _gain, headlines
from study.plan import all_runs, load_study
from study.records import Clock
from study.statistics import interval, mean_course
from study.workers import complete
from tests.study.tiny import HANG, write_language


@pytest.mark.slow
def test_language_models_start_from_one_training(tmp_path):
    path, out = write_language(tmp_path), tmp_path / "out"
    assert main(["run", str(path), "--out", str(out), "--device", "cpu"]) == 0
    records = {
        record["spec"]["phases"][-1]["model"]["mixer"]: record["outcome"]
        for record in (json.loads(p.read_text()) for p in (out / "records").iterdir())
    }
    assert set(records) == {"delta_net", "osdn"}
    bits = [record["train"]["bits_per_byte"] for record in records.values()]
    base = [
        json.loads((p / "log.jsonl").read_text().splitlines()[-1])
        for p in (out / "work").iterdir()
        if (p / "checkpoints" / "step_20").exists()
    ]
    assert len(base) == 1 and base[0]["bits_per_byte"] < 7  # it has learned something
    assert bits == pytest.approx([base[0]["bits_per_byte"]] * 2, abs=1e-4)
    for record in records.values():
        assert record["steps"] == 23 and record["train"]["loss"] > 0
        scores = record["evaluations"]["perplexity"]["scores"]
        assert scores[1]["value"] == pytest.approx(bits[0], rel=0.05)
        recall = {one["group"] for one in record["evaluations"]["recall"]["scores"]}
        assert recall == {"once", "twice", "guesser"}
    models = [p for p in (out / "work").iterdir() if (p / "model").exists()]
    assert len(models) == 3  # one base, two continuations
    page = (out / "report.md").read_text()
    assert "| measure | as DeltaNet | as OSDN |" in page and "recall, twice, contains" in page
    assert "upgrade: less as DeltaNet, paired by seed" in page
    result = json.loads((out / "results" / "upgrade" / "result.json").read_text())
    assert [set(curve["series"]) for curve in result["curves"]] == [{"as DeltaNet", "as OSDN"}]


@pytest.mark.slow
def test_runs_of_two_corpora_are_no_pairs(tmp_path, capsys):
    path, out = write_language(tmp_path), tmp_path / "out"
    words = ["run", str(path), "--out", str(out), "--device", "cpu"]
    assert main(words) == 0
    less = "| bits per byte, validation |"
    assert re.search(re.escape(less) + r" [+-]\d", (out / "report.md").read_text())
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    assert main(words) == 0  # nothing is to be trained
    ours = next((out / "records").iterdir())
    record = json.loads(ours.read_text())
    ours.unlink()
    capsys.readouterr()
    assert main(words) == 1
    said = capsys.readouterr().err
    assert f"(data {record['outcome']['data']})" in said and "give a new --out" in said
    record["outcome"]["data"] = "0" * 16  # as if it had been merged from another machine
    ours.write_text(json.dumps(record))
    assert main([*words, "--list"]) == 0
    assert f"{less} – |" in (out / "report.md").read_text()
    # Weights that are kept in the working directory are of the files before the change, too.
    again = ["run", str(path), "--out", str(tmp_path / "new"), "--work", str(out / "work")]
    assert main([*again, "--device", "cpu"]) == 1
    said = capsys.readouterr()
    assert "trained on another corpus or tokenizer" in said.out + said.err


def test_a_seed_that_is_not_finite_is_said_and_not_averaged():
    assert _cell({0: 1.5, 1: 2.5}) == "2 (1.5 to 2.5, n=2)"
    assert _cell({0: math.nan, 1: 2.5}) == "2.5 (2.5 to 2.5, n=1), not finite in 1 of 2"
    assert _cell({0: math.inf}) == "not finite in 1 of 1" and _cell({}) == "not run"
    assert _gain([1.0, 3.0]) == "+2.0000 [-10.7060, +14.7060]"
    assert _gain([math.nan, 0.0]) == _gain([]) == "–" and _gain([1.5]) == "+1.5000"
    assert mean_course([[[1, 2.0], [2, math.nan]], [[1, 4.0, 0], [2, 1.0], [3, 5.0]]]) == [
        [1, 3.0, 2.0, 4.0],
        [3, 5.0, 5.0, 5.0],
    ]


def test_curves_with_several_series_have_a_panel_each():
    both = {"title": "q", "y": "q", "series": {"own": [[0, 1.0]], "ones": [[0, 2.0]]}}
    layers = {"title": "by layer", "series": {"layer 0": [[0, 1.0]]}}
    outcome = {"evaluations": {"a": {"curves": [both, layers]}}}
    axes = {"title": "q", "y": "q"}
    assert _curves(outcome) == [("q: own", axes, [[0, 1.0]]), ("q: ones", axes, [[0, 2.0]])]


@pytest.mark.slow
def test_two_at_a_time_that_begin_alike_train_it_once(tmp_path):
    runs = all_runs(load_study(write_language(tmp_path)))
    found = list(
        complete(runs, processes=2, device="cpu", work=tmp_path / "work", left=lambda: 100.0,
                 seconds=lambda run: 0.0)
    )  # fmt: skip
    assert [error for _, _, error, _ in found] == ["", ""]
    logs = [
        (p / "log.jsonl").read_text() for p in (tmp_path / "work").iterdir() if p.name != "eval"
    ]
    assert sorted(log.count('"train"') for log in logs) == [3, 3, 20]
    # The clock goes by steps that are trained: with the base there, a run has 3 and not 23.
    assert {outcome["steps"] for _, outcome, *_ in found} == {23}
    assert steps_left(runs[0].spec, tmp_path / "work") == 0
    assert steps_left(runs[0].spec, tmp_path / "elsewhere") == 23
    record = {"kind": "language", "spec": runs[0].spec, "machine": "here", "processes": 1}
    seconds = {"train": 6.0, "evaluations": 40.0}
    record |= {"outcome": {"steps": 23, "trained": 3, "seconds": seconds}, "seconds": 46.0}
    study = load_study(tmp_path / "language.yaml")
    clock = Clock(study, [record], "here", 1)
    assert clock.seconds(runs[1]) == (2.0 * 23 + 40, "measured")
    # What a checkpoint has need not be trained, nor is it in the assumption.
    directory = directory_of(runs[0].spec, 0, tmp_path / "elsewhere")
    (directory / "checkpoints" / "step_12").mkdir(parents=True)
    (directory / "checkpoints" / "step_8").mkdir()
    assert steps_left(runs[0].spec, tmp_path / "elsewhere") == 11
    rest = Clock(
        study, [], "here", 1, left=lambda run: steps_left(run.spec, tmp_path / "elsewhere")
    )
    assert rest.seconds(runs[0]) == (pytest.approx(11 / 23), "assumed")


def test_a_run_killed_in_its_evaluations_goes_on_with_those_that_are_left(tmp_path):
    run, work = all_runs(load_study(write_language(tmp_path)))[0], tmp_path / "work"
    whole = perform(run.spec, device="cpu", work=work)
    perplexity, recall = (
        work / "eval" / run.name / name / "result.json" for name in ("perplexity", "recall")
    )
    made = perplexity.stat().st_mtime_ns
    recall.unlink()  # as if it had not come so far
    again = perform(run.spec, device="cpu", work=work)
    assert perplexity.stat().st_mtime_ns == made and recall.exists()
    assert again["evaluations"] == whole["evaluations"] and again["trained"] == 0
    shutil.rmtree(directory_of(run.spec, 0, work))  # another model: its evaluations are its own
    assert sorted(perform(run.spec, device="cpu", work=work)["evaluated"]) == [
        "perplexity",
        "recall",
    ]
    assert perplexity.stat().st_mtime_ns > made
    # The clock takes the seconds of evaluations from runs that made them all.
    assert sorted(whole["evaluated"]) == ["perplexity", "recall"] and again["evaluated"] == [
        "recall"
    ]
    record = {"kind": "language", "spec": run.spec, "machine": "here", "processes": 1}
    clock = Clock(load_study(tmp_path / "language.yaml"), [], "here", 1)
    for outcome, seconds in ((whole, 40.0), (again, 3.0)):
        outcome["seconds"]["evaluations"] = seconds
        clock.learn({**record, "outcome": outcome})
    assert list(clock.evaluations.values()) == [[40.0]]


def test_a_misspelt_evaluation_is_named_before_anything_is_trained(tmp_path, capsys):
    path = write_language(tmp_path)
    whole = path.read_text()
    words = ["run", str(path), "--out", str(tmp_path / "out"), "--device", "cpu"]
    for before, after, said in (
        ("limit: 3", "limitt: 3", "no option 'limitt'; there are data, "),
        ("limit: 3", "limit: 0", "limit: expected at least 1, got 0"),
        ("limit: 3", "limit: three", "perplexity.limit: Input should be a valid integer"),
        ("task: recall", "task: recal", "expected one of the tasks recall, "),
    ):
        path.write_text(whole.replace(before, after))
        assert main(words) == 1
        error = capsys.readouterr().err
        assert said in error and "evaluations" in error, error


def test_initial_values_can_be_others(tmp_path):
    """A variant that begins with d_1 = 0 is another run, and its first checkpoint says so."""
    path = write_language(tmp_path)
    raw = yaml.safe_load(path.read_text())
    experiment = raw["language"]["upgrade"]
    experiment["variants"] = {"OSDN": {}, "from 0": {"fill": {"initial_precond": 0}}}
    experiment |= {"measured": None, "evaluations": {}}
    experiment["overrides"] = ["train.steps=1", "train.optimizer.lr=1e-12"]
    path.write_text(yaml.safe_dump(raw))
    ones, zeros = all_runs(load_study(path))
    assert "fill" not in ones.spec["phases"][0]
    for run, value in ((ones, 1.0), (zeros, 0.0)):
        perform(run.spec, device="cpu", work=tmp_path / "work")
        model = directory_of(run.spec, 0, tmp_path / "work") / "model"
        weights = load_file(model / "model.safetensors")
        found = [x for name, x in weights.items() if name.endswith("initial_precond")]
        assert found and all((x - value).abs().max() < 1e-6 for x in found)
    zeros.spec["phases"][0]["fill"] = {"precond": 0.0}
    with pytest.raises(UserError, match="no parameter whose name ends with 'precond'"):
        perform(zeros.spec, device="cpu", work=tmp_path / "work")


def test_variants_that_are_named_first_run_first_and_the_others_one_after_another(tmp_path):
    path = write_language(tmp_path)
    fields = yaml.safe_load(path.read_text())
    study = fields["language"]["upgrade"]
    study |= {"seeds": [3, 5], "measured": ["base", "as OSDN", "as DeltaNet"]}

    def order() -> list[tuple[str, int]]:
        path.write_text(yaml.safe_dump(fields))
        return [(one.label, one.seed) for one in all_runs(load_study(path))]

    labels = study["measured"]
    assert order() == [(label, seed) for seed in (3, 5) for label in labels]
    study["first"] = ["as OSDN"]
    expected = [(label, seed) for label in ("as OSDN", "base", "as DeltaNet") for seed in (3, 5)]
    assert order() == expected
    study["first"] = ["as DeltaNet", "base"]
    both = [(label, seed) for seed in (3, 5) for label in ("base", "as DeltaNet")]
    assert order() == [*both, ("as OSDN", 3), ("as OSDN", 5)]
    study["first"] = ["as OSDM"]
    with pytest.raises(
        UserError, match="no variant 'as OSDM'; there are as DeltaNet, as OSDN, base"
    ):
        order()


def test_the_headline_is_drawn_with_its_interval():
    def record(value):
        trained = {"loss": value, "bits_per_byte": None, "nonfinite": 0}
        return {"outcome": {"train": trained, "evaluations": {}}}

    pairs = {"a": [(record(3.0), record(1.0)), (record(5.0), record(1.0))], "b": []}
    (plot,) = headlines(["loss, mean of the last 50 steps"], "first", pairs)
    one = {"values": [2.0, 4.0], "interval": interval([2.0, 4.0])}
    assert plot["series"] == {"a": one} and "less first" in plot["title"]
    assert headlines(["another"], "first", pairs) == headlines([], "first", pairs) == []
    (axes,) = figure([plot], []).axes
    drawn = [list(line.get_xdata()) for line in axes.lines]
    assert [2.0, 4.0] in drawn and [3.0] in drawn and list(one["interval"]) in drawn
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a, n=2"]


@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint_of_the_language_model_under_way(tmp_path):
    path, out = write_language(tmp_path), tmp_path / "out"
    recipe = (tmp_path / "lm.yaml").read_text()
    (tmp_path / "lm.yaml").write_text(recipe.replace("steps: 20", "steps: 100000"))
    process = subprocess.Popen(
        [sys.executable, "-m", "study", "run", path, "--out", out, "--device", "cpu"],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + HANG
    while not any(log.stat().st_size for log in out.glob("work/*/log.jsonl")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    (saved,) = out.glob("work/*/checkpoints/step_*")
    assert 0 < int(saved.name.removeprefix("step_")) < 100000
