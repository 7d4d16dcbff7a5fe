"""The demo: what its three parts measure, and that its titles say what was found."""

import pytest
import torch

from osdn.cli.demo import adaptation, pictures, recall, text
from osdn.cli.main import main
from osdn.evals.mqar.grid import CELLS
from osdn.evals.results import write_json

TINY = [
    "train.steps=3", "train.seq_len=64", "train.rows=1", "data.validation_bytes=512",
    "model.hidden_size=32", "model.num_hidden_layers=2", "model.intermediate_size=32",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_the_step_of_each_feature_goes_to_what_its_tokens_need(seed):
    found = adaptation.read_sequences(seed)
    beta = torch.tensor(adaptation.STRENGTHS, dtype=torch.float64)
    plain, ours = found.left["DeltaNet"], found.left["OSDN"]
    # Unit keys and d = 1 leave 1 − β, to rounding; d = 1/β would leave nothing.
    torch.testing.assert_close(plain, 1 - beta[found.kind.T], rtol=0, atol=1e-9)
    assert ours[-50:].mean() < 0.08 < 0.3 < plain[-50:].mean()
    by_kind = found.precond[-1].unflatten(-1, (len(beta), -1)).mean((0, 2))
    torch.testing.assert_close(by_kind, 1 / beta, rtol=0.2, atol=0)


def shares(first: float, spread: float, seeds: int = 8) -> list[list[float]]:
    """By seed, the first quarter's share around `first`, the rest's at a half."""
    n = recall.PAIRS // 4
    return [[first + spread * (-1) ** i] * n + [0.5] * 3 * n for i in range(seeds)]


@pytest.mark.parametrize(
    ("first", "spread", "said"),
    [
        (0.7, 0.05, "OSDN keeps the first pairs: +0.20"),
        (0.52, 0.3, "These seeds do not decide about the first pairs: +0.02"),
        (0.3, 0.05, "OSDN recalls fewer of the first pairs: -0.20"),
    ],
)
def test_the_title_says_what_the_seeds_say(first, spread, said):
    found = recall.Recall({"osdn": shares(first, spread), "delta_net": shares(0.5, 0)})
    assert pictures.tell_recall(found).startswith(said)


def test_the_interval_is_students():
    # Mean 2, standard deviation 1, n = 3: 2 ± 4.303 / √3.
    assert recall.interval([1.0, 2.0, 3.0]) == pytest.approx((2, 2 - 2.4843, 2 + 2.4843), abs=1e-4)


@pytest.mark.slow
def test_demo_runs_all_three_parts_and_draws(capsys, tmp_path, monkeypatch):
    short = {"examples": 32, "test_examples": 16, "epochs": 1, "processes": 1, "device": "cpu"}
    monkeypatch.setitem(recall.RECIPE, "train", short)
    monkeypatch.setattr(adaptation, "TOKENS", 60)
    monkeypatch.setattr(text, "SAMPLE", 50_000)
    assert main(["demo", "--out", str(tmp_path), "--seeds", "2", *TINY]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Three parts") and "minutes" in out.splitlines()[0]
    assert "own write leaves" in out and ", 2 seeds" in out and "\n\nThe" in out
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "recall" / CELLS).iterdir())) == 4


def test_recall_takes_the_outcomes_by_model_and_seed(tmp_path, monkeypatch):
    def compare(recipe, out):
        for cell in recipe.cells():
            share = cell.seed / 100 + (cell.mixer == "osdn") / 10
            outcome = {"cell": {}, "accuracy": share, "diverged": False, "state_size": 1}
            write_json(out / CELLS / cell.file, outcome | {"by_pair": [share] * recall.PAIRS})

    monkeypatch.setattr(recall, "compare", compare)
    found = recall.measure(tmp_path, 2)
    assert found.gain(3) == pytest.approx((0.1, 0.1, 0.1))
    assert found.quarters("delta_net") == [pytest.approx([0.61] * 4), pytest.approx([0.62] * 4)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "none.yaml"], "none.yaml: cannot read the recipe"),
        (["--seeds", "0"], "--seeds: expected at least 1"),
        (["data.validation=0"], "data.validation: the demo needs held-out text"),
    ],
)
def test_demo_says_what_is_wrong_before_it_measures(capsys, tmp_path, words, message):
    assert main(["demo", "--out", str(tmp_path), *words]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out
