"""The study's command: a run is done once, whoever does it, and a kill costs little."""

import json
import lzma
import os
import signal
import subprocess
import sys
import time

import pytest

from osdn.evals.plots import figure
from study.__main__ import main
from study.plan import Run, all_runs, load_study
from study.records import Clock, Records, append
from study.report import mqar_points, mqar_result
from study.statistics import best_rate, edge, gains, interval, row, signed, student
from study.workers import Worker, complete, visible_gpus
from tests.study.tiny import HANG, write_mqar


def study(*words) -> int:
    return main(["run", *map(str, words), "--processes", "2", "--device", "cpu"])


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished study of 16 runs: (its file, its directory, its packed records)."""
    directory = tmp_path_factory.mktemp("done")
    path, pack = write_mqar(directory), directory / "records.jsonl"
    assert study(path, "--out", directory / "out", "--pack", pack) == 0
    return path, directory / "out", pack


def test_every_run_leaves_a_record_of_its_own(done):
    path, out, pack = done
    runs = all_runs(load_study(path))
    assert len(runs) == 16
    assert {p.stem for p in (out / "records").iterdir()} == {run.name for run in runs}
    for run in runs:
        record = json.loads((out / "records" / f"{run.name}.json").read_text())
        assert record["spec"] == run.spec and record["outcome"]["steps"] == 4
        assert 0 <= record["outcome"]["accuracy"] <= 1
    assert len(pack.read_text().splitlines()) == 16


def test_a_finished_study_is_not_run_again(done, capsys):
    path, out, _ = done
    before = {p: p.stat().st_mtime_ns for p in (out / "records").iterdir()}
    assert study(path, "--out", out) == 0
    assert "in all 0 of 16 runs" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (out / "records").iterdir()} == before


def test_the_report_says_what_the_records_say(done):
    _, out, _ = done
    records = [json.loads(p.read_text()) for p in (out / "records").iterdir()]
    page = (out / "report.md").read_text()
    hard = [r for r in records if r["spec"]["task"]["pairs"] == 4]
    for mixer in ("delta_net", "osdn"):
        rates = {}
        for r in hard:
            if r["spec"]["mixer"]["mixer"] == mixer:
                rates.setdefault(r["spec"]["learning_rate"], []).append(r["outcome"]["accuracy"])
        best = max(sum(values) / 2 for values in rates.values())
        line = next(
            x
            for x in page.splitlines()
            if x.startswith(f"| 16 tokens, 4 pairs, width 8 | {mixer} |")
        )
        assert f"| {best:.3f} |" in line
    result = json.loads((out / "results" / "maps" / "result.json").read_text())
    assert [len(one["values"][0]) for one in result["maps"]] == [2, 2]
    for name in ("grid", "maps"):
        assert (out / "results" / name / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_an_experiment_of_one_task_shows_every_seed_at_the_best_rate(done):
    path, out, _ = done
    study = load_study(path)
    study.mqar["grid"].tasks.pop(0)
    grid = mqar_points(study, Records(out), "grid")
    strip, places = mqar_result(study, "grid", grid)["curves"]
    (mixers,) = grid.values()
    assert set(places["series"]) == {"delta_net", "osdn"}
    for mixer, points in places["series"].items():  # a pair's mean over seeds; their mean is all's
        assert [x for x, *_ in points] == [1, 2, 3, 4]
        mean = sum(y for _, y, *_ in points) / 4
        assert mean == pytest.approx(sum(strip["series"][mixer]) / 2, abs=1e-3)
    for mixer, shares in strip["series"].items():
        means = [sum(x["accuracy"] for x in seeds.values()) / 2 for seeds in mixers[mixer].values()]
        assert len(shares) == 2 and sum(shares) / 2 == pytest.approx(max(means))
    axes, by_pair = figure([strip, places], []).axes
    assert [list(line.get_xdata()) for line in by_pair.lines] == [[1, 2, 3, 4]] * 2
    drawn = [list(line.get_xdata()) for line in axes.lines]
    assert drawn[0] == strip["series"]["delta_net"] and len(drawn) == 4
    assert [label.get_text() for label in axes.get_yticklabels()] == ["delta_net", "osdn"]


def test_equal_runs_of_two_experiments_are_one(tmp_path, done):
    path, _, _ = done
    raw = load_study(path).model_dump(mode="json")
    raw["mqar"]["again"] = {**raw["mqar"]["grid"], "seeds": [1, 2], "question": "another"}
    raw["mqar"]["again"]["mixers"] = {"other name": raw["mqar"]["grid"]["mixers"]["osdn"]}
    both = tmp_path / "both.yaml"
    both.write_text(json.dumps(raw))
    assert len(all_runs(load_study(both))) == 16 + 4  # seed 1 is there, seed 2 is new


def test_two_machines_do_one_half_each_and_are_merged(tmp_path, done, capsys):
    path, out, pack = done
    halves = [tmp_path / name for name in ("a", "b")]
    for half, seed in zip(halves, (0, 1)):
        (half / "records").mkdir(parents=True)
        for p in (out / "records").iterdir():
            if json.loads(p.read_text())["spec"]["seed"] == seed:
                (half / "records" / p.name).write_bytes(p.read_bytes())
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(pack.read_bytes()[:-30])  # a kill in the middle of the last line
    assert study(path, "--out", tmp_path / "c", "--merge", *halves, cut, "--list") == 0
    said = capsys.readouterr().out
    assert "16 records taken over, 15 were there" in said and "in all 0 of 16 runs" in said
    assert (tmp_path / "c" / "report.md").exists()


def test_compressed_records_are_taken_over(tmp_path, done, capsys):
    path, _, pack = done
    whole = tmp_path / "all.jsonl.xz"
    whole.write_bytes(lzma.compress(pack.read_bytes()))
    assert study(path, "--out", tmp_path / "d", "--merge", whole, "--list") == 0
    assert "in all 0 of 16 runs" in capsys.readouterr().out
    whole.write_bytes(whole.read_bytes()[:-50])
    assert study(path, "--out", tmp_path / "e", "--merge", whole, "--list") == 1
    assert "all.jsonl.xz: cannot read" in capsys.readouterr().err


def test_a_pack_that_a_kill_cut_off_is_gone_on_with(tmp_path, done, capsys):
    path, out, pack = done
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(pack.read_bytes()[:-30])
    record = json.loads(next((out / "records").iterdir()).read_text())
    append(cut, record)
    lines = cut.read_text().splitlines()
    assert len(lines) == 16 and json.loads(lines[-1]) == record
    assert study(path, "--out", tmp_path / "d", "--merge", cut, "--list") == 0
    cut.write_text('{"a": 1}\n')
    assert study(path, "--out", tmp_path / "d", "--merge", cut, "--list") == 1
    assert "something else than records" in capsys.readouterr().err
    assert study(path, "--out", tmp_path / "e", "--pack", tmp_path) == 1
    assert f"{tmp_path}: cannot write" in capsys.readouterr().err
    assert not (tmp_path / "e" / "records").exists()  # told before the first run
    assert main(["run", str(path), "--minutes", "-1"]) == 1
    assert "--minutes: expected a number above 0" in capsys.readouterr().err
    for option in ("--models", "--processes"):
        assert main(["run", str(path), option, "0", "--list"]) == 1
        assert f"{option}: expected at least 1" in capsys.readouterr().err


def test_a_record_under_a_wrong_name_is_refused(tmp_path, done, capsys):
    path, out, _ = done
    (tmp_path / "records").mkdir()
    record = next((out / "records").iterdir())
    (tmp_path / "records" / "0123456789abcdef.json").write_bytes(record.read_bytes())
    assert study(path, "--out", tmp_path, "--list") == 1
    assert f"holds the run {record.stem}" in capsys.readouterr().err


@pytest.mark.slow
def test_kill_9_loses_what_is_under_way_and_nothing_else(tmp_path):
    path = write_mqar(tmp_path, seeds=list(range(12)), train={"examples": 512, "epochs": 1})
    out = tmp_path / "out"
    words = ["run", path, "--out", out, "--processes", "2", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "study", *map(str, words)],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + HANG
    while len(list(out.glob("records/*.json"))) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {p.name: p.read_bytes() for p in out.glob("records/*.json")}
    assert 3 <= len(kept) < 96
    known = Records(out)  # every file is whole
    runs = all_runs(load_study(path))
    left = [run for run in runs if run.name not in known.found]
    assert len(left) == 96 - len(kept)
    assert study(path, "seeds_of=0", "--out", out, "--list") == 1  # a misspelt field is named
    assert study(path, "mqar.grid.seeds=[0]", "--out", out) == 0
    for name, data in kept.items():
        assert (out / "records" / name).read_bytes() == data


@pytest.mark.slow
def test_a_deadline_is_kept_and_a_failed_run_is_told(tmp_path, capsys):
    path = write_mqar(tmp_path)
    runs = all_runs(load_study(path))
    found = complete(
        runs,
        processes=1,
        device="cpu",
        work=tmp_path,
        left=lambda: 100.0,
        seconds=lambda run: 1.0 if run is runs[3] else 1000.0,
    )
    assert [one.name for one, *_ in found] == [runs[3].name]  # the others would not fit
    assert not list(
        complete(runs, processes=1, device="cpu", work=tmp_path, left=lambda: 0.0,
                 seconds=lambda run: 0.0)
    )  # fmt: skip
    broken = Run("mqar", "grid", "x", 0, {**runs[0].spec, "width": -1}, 1)
    ((run, outcome, error, _),) = complete(
        [broken], processes=1, device="cpu", work=tmp_path, left=lambda: 100.0,
        seconds=lambda run: 0.0,
    )  # fmt: skip
    assert run is broken and outcome is None and "Error" in error


@pytest.mark.slow
def test_a_process_that_dies_costs_its_run_and_is_replaced(tmp_path, monkeypatch):
    runs = all_runs(load_study(write_mqar(tmp_path)))[:2]
    endless = Run("mqar", "grid", "x", 0, json.loads(json.dumps(runs[0].spec)), 1)
    endless.spec["learning_rate"] = 1e-12
    endless.spec["train"]["epochs"] = 10**6
    original = Worker.give

    def give(self, run):
        original(self, run)
        if run is endless:
            self.process.kill()

    monkeypatch.setattr(Worker, "give", give)
    (first, nothing, error, _), (second, outcome, fine, _) = complete(
        [endless, runs[1]], processes=1, device="cpu", work=tmp_path, left=lambda: 100.0,
        seconds=lambda run: 0.0,
    )  # fmt: skip
    assert first is endless and nothing is None and error == "its process died (-9)"
    assert second is runs[1] and outcome["steps"] == 4 and fine == ""


def test_the_clock_takes_what_was_measured(done):
    path, out, _ = done
    plan = load_study(path)
    runs, records = all_runs(plan), Records(out).found
    nothing = Clock(plan, [], "here", 2)
    assert nothing.seconds(runs[0]) == (0.001 * 4, "assumed")
    machine = next(iter(records.values()))["machine"]
    clock = Clock(plan, [{**r, "seconds": 2.0} for r in records.values()], machine, 2)
    assert clock.seconds(runs[0]) == (2.0, "measured")
    assert clock.total(runs) == pytest.approx(16.0)
    other = load_study(path, ["mqar.grid.tasks=[{length: 32, pairs: 2, batch_size: 16}]"])
    seconds, source = Clock(other, records.values(), machine, 2).seconds(all_runs(other)[0])
    assert source == "scaled by tokens" and seconds > 0
    assert Clock(plan, records.values(), "another GPU", 2).seconds(runs[0])[1] == "assumed"


def test_statistics():
    def points(table):
        return {lr: {s: {"accuracy": a} for s, a in enumerate(row)} for lr, row in table.items()}

    base = points({0.1: [0.5, 0.6, 0.7], 0.2: [0.9, 0.1, 0.1]})
    other = points({0.1: [0.6, 0.8, 0.7], 0.2: [1.0]})  # 0.2 has one seed: not comparable yet
    assert best_rate(base) == 0.1 and best_rate(other) == 0.1
    assert edge(0.1, [0.1, 0.2]) == "lowest" and edge(0.2, [0.1, 0.2, 0.3]) == "–"
    low, high = interval([0.1, 0.2, 0.0])
    assert low == pytest.approx(0.1 - 4.303 * 0.1 / 3**0.5) and high == pytest.approx(0.2 - low)
    assert signed(gains(other, base), ".3f") == "+0.100 [-0.148, +0.348]"
    for degrees, expected in ((2, 4.303), (9, 2.262), (10, 2.228), (11, 2.201), (30, 2.042)):
        assert student(degrees) == pytest.approx(expected, abs=1e-3)
    late = {0.1: {s: {"accuracy": a, "state_size": 9, "diverged": False}
                  for s, a in enumerate((0.9, 0.8, 0.05))}}  # fmt: skip
    assert row(late, "–", [])[3:8] == ["0.583", "0.465", "0.800", 1, "0.050 to 0.900"]
    assert row(late, "–", [])[9:11] == ["–", "–"]
    assert row(late, "–", [0.1, -0.2, 0.4])[9:11] == ["+0.100 [-0.645, +0.845]", "2 of 3"]


def test_each_gpu_by_the_name_that_it_has_here(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    assert visible_gpus() == ["5", "3"]
