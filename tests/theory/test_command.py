"""`python -m theory` end to end, the learned methods stopped early, and its document's names."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

from theory import experiments
from theory.__main__ import main
from theory.bounds import precond_path


@pytest.mark.slow
def test_theory_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(experiments, "CAP", 200)
    assert main(["--out", str(tmp_path)]) == 0
    report = (tmp_path / "report.md").read_text()
    assert report in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines()]
    counts = {tuple(row[:2]): row[2:] for row in rows if row and row[0] in ("aligned", "rotated")}
    assert set(counts["rotated", "right-Newton"]) == {"1"}
    # Aligned: 28 iterations at κ = 1e6 where gradient descent needs millions. Rotated: stopped.
    assert int(counts["aligned", "diagonal, normalised step"][-1]) < 60
    plain = counts["aligned", "gradient descent, best fixed step"]
    assert int(plain[-1].replace(",", "")) > 1_000_000
    assert counts["rotated", "diagonal, normalised step"][-1].startswith(">")
    # Unit keys, d_1 = 1, b = 1, γ = 1: OSDN is the delta rule, so its error is the same.
    same = [row for row in rows if row and row[:2] == ["key axes jump", "1"]]
    assert len(same) == 6 and {row[4] for row in same} == {"1.000"}
    for name in ("full_batch", "token_local", "drift"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_out_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file" / "below")]) == 1
    assert "--out" in capsys.readouterr().err


def test_the_worst_keys_spend_what_they_should():
    """hardest_keys: unit keys, and equal shares of ‖d_1 − 1‖² while there is enough left."""
    d1 = torch.tensor([1.4, 0.3, 1.1], dtype=torch.float64)
    k = experiments.hardest_keys(d1, 200, eta=0.5)
    assert (k.square().sum(-1) - 1).abs().max() < 1e-12
    distance = (precond_path(k, d1, eta=0.5).d - 1).square().sum(-1)
    spent = -distance.diff()[:150]
    assert (spent - distance[0] / 200).abs().max() < 1e-9


def test_the_document_names_what_exists():
    """Every function and test that the theory page names is there, and every bound is named."""
    root = Path(__file__).parents[2]
    text = (root / "docs" / "explanation" / "theory.md").read_text()
    named = re.findall(r"`((?:theory|osdn\.ops)\.\w+)\.(\w+)`", text)
    for module, name in named:
        assert callable(getattr(import_module(module), name)), f"{module}.{name}"
    assert len({name for _, name in named}) >= 18
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name
