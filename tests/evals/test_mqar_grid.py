"""The MQAR grid: it goes on where it stopped, its table, its processes, its errors."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from osdn.cli.main import main
from osdn.errors import UserError
from osdn.evals.mqar.grid import CELLS, compare
from osdn.evals.mqar.recipe import MQARRecipe
from tests.train.tiny import HANG, children

SMALL = {
    "mixers": {
        "delta": {"mixer": "delta_net", "num_heads": 1},
        "softmax": {"mixer": "attention", "num_heads": 1},
    },
    "tasks": [{"length": 16, "pairs": 2, "batch_size": 8}],
    "widths": [8],
    "learning_rates": [1e-3, 1e-2],
    "seeds": [0],
    "language": {"vocab_size": 16},
    "train": {"examples": 32, "test_examples": 16, "epochs": 1, "device": "cpu"},
}


def test_finished_cells_are_skipped_and_others_trained(tmp_path, monkeypatch):
    import osdn.evals.mqar.grid as grid

    trained = []
    real = grid.train_cell
    monkeypatch.setattr(grid, "train_cell", lambda r, c: trained.append(c) or real(r, c))
    first = compare(MQARRecipe.model_validate(SMALL), tmp_path)
    assert len(trained) == 4
    for path in sorted((tmp_path / CELLS).iterdir())[:1]:
        path.unlink()
    second = compare(MQARRecipe.model_validate(SMALL), tmp_path)
    assert len(trained) == 5
    assert second["tables"] == first["tables"] and (tmp_path / "mqar.png").stat().st_size > 5000


def test_the_table_takes_each_mixers_best_learning_rate(tmp_path):
    """Against a count made by hand from invented cells."""
    recipe = MQARRecipe.model_validate({**SMALL, "seeds": [0, 1]})
    accuracy = {("delta", 1e-3): (0.2, 0.4), ("delta", 1e-2): (0.9, 0.1),
                ("softmax", 1e-3): (0.5, 0.7), ("softmax", 1e-2): (1.0, 0.0)}  # fmt: skip
    for cell in recipe.cells():
        outcome = {"cell": recipe.describe(cell), "steps": 1, "diverged": False, "state_size": 7,
                   "accuracy": accuracy[cell.mixer, cell.learning_rate][cell.seed]}  # fmt: skip
        (tmp_path / CELLS).mkdir(exist_ok=True)
        (tmp_path / CELLS / cell.file).write_text(json.dumps(outcome))
    rows = compare(recipe, tmp_path)["tables"][0]["rows"]
    assert [row[1:] for row in rows] == [
        ["delta", "7", "0.01", "0.500", "0.566", "0.900", 0],
        ["softmax", "7", "0.001", "0.600", "0.141", "1.000", 0],
    ]


def test_errors_are_one_line(tmp_path, capsys):
    recipe = tmp_path / "grid.yaml"
    recipe.write_text(json.dumps(SMALL))
    cases = {
        "tasks=[{length: 16, pair: 2, batch_size: 8}]": "did you mean 'pairs'",
        "tasks=[{length: 16, pairs: 5, batch_size: 8}]": "1 to length / 4 = 4",
        "mixers={x: {mixer: mamba}}": "expected mixer: one of osdn, delta_net",
        "mixers={x: {mixer: osdn, num_heads: 1, etta: 1}}": "etta",
        "mixers={x: {mixer: osdn, num_heads: 3}}": "num_heads",
        "seeds=[0, 0]": "two cells",
        "learning_rates=[0]": "> 0",
    }
    for override, message in cases.items():
        assert main(["mqar", str(recipe), override, "--out", str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and ": :" not in error, error


def test_cells_of_another_recipe_are_not_mixed_in(tmp_path, capsys):
    recipe = tmp_path / "grid.yaml"
    recipe.write_text(json.dumps(SMALL))
    assert main(["mqar", str(recipe), "--out", str(tmp_path / "out")]) == 0
    assert main(["mqar", str(recipe), "train.epochs=2", "--out", str(tmp_path / "out")]) == 1
    assert "another recipe" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{}", "[]", "{", "[" * 100_000])
def test_a_damaged_cell_is_one_line(tmp_path, content):
    recipe = MQARRecipe.model_validate(SMALL)
    path = tmp_path / CELLS / recipe.cells()[0].file
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(UserError, match=rf"{re.escape(path.name)}: damaged; delete it"):
        compare(recipe, tmp_path)


@pytest.mark.parametrize("name", ["mqar_small", "mqar_published"])
def test_the_recipes_load(name):
    from osdn.train.recipe import load_sections

    path = Path(__file__).parents[2] / "recipes" / f"{name}.yaml"
    recipe = load_sections(MQARRecipe, path)
    assert {"delta_net", "osdn", "attention"} <= set(recipe.mixers)


# Cells at the first rate diverge and end with their first epoch; the others never end.
SLOW = {**SMALL["train"], "examples": 1_000, "epochs": 10**7, "stop_at": 1, "processes": 2}
ENDLESS = {**SMALL, "learning_rates": [1e30, 1e-3], "train": SLOW}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition) -> None:
    limit = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("victim", ["grid", "worker"])
def test_a_process_that_is_killed_leaves_none_behind(tmp_path, victim):
    recipe, out = tmp_path / "grid.yaml", tmp_path / "out"
    recipe.write_text(json.dumps(ENDLESS))
    words = [sys.executable, "-m", "osdn", "mqar", str(recipe), "--out", str(out)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as grid:
        try:
            # Of four cells the first and the third end. The second was taken before the third, and
            # never ends: so one worker has it, and the other has made the third. Both are at work.
            wait_for(lambda: grid.poll() is not None or len(list(out.glob(f"{CELLS}/*.json"))) == 2)
            # They are children of the server that they are forked from.
            workers = [pid for server in children(grid.pid) for pid in children(server)]
            assert len(workers) == 2
            os.kill(grid.pid if victim == "grid" else workers[0], signal.SIGKILL)
            wait_for(lambda: not any(map(alive, workers)))
            said = grid.stderr.read()
        finally:
            grid.kill()
    if victim == "worker":
        assert grid.returncode == 1 and "a worker process was killed" in said
        assert "Traceback" not in said
