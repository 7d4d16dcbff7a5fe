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
from tests.train.tiny import children

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
        "mixers={x: {mixer: mamba}}": "expected mixer: osdn",
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


HANG = 1800.0  # seconds
SLOW = {**SMALL["train"], "examples": 1_000, "epochs": 10_000, "stop_at": 1, "processes": 2}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition):
    """Until it holds; the time ends a hang, and a busy machine needs a tenth of it."""
    deadline = time.monotonic() + HANG
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def workers_of(pid: int) -> list[int]:
    """The processes of a grid that train."""
    below = [one for one in children(pid) if alive(one)]
    return [one for one in below if b"spawn_main" in Path(f"/proc/{one}/cmdline").read_bytes()]


def works(pid: int) -> bool:
    """Whether a worker has imported what it computes with."""
    try:
        return "libtorch_python" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("victim", ["grid", "worker"])
def test_a_process_that_is_killed_leaves_none_behind(tmp_path, victim):
    recipe = tmp_path / "grid.yaml"
    recipe.write_text(json.dumps({**SMALL, "train": SLOW}))
    words = [sys.executable, "-m", "osdn", "mqar", str(recipe), "--out", str(tmp_path / "out")]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as grid:
        try:
            # Two workers, beside multiprocessing's resource tracker.
            assert wait_for(lambda: len(workers_of(grid.pid)) == 2)
            workers = workers_of(grid.pid)
            assert wait_for(lambda: all(map(works, workers)))
            os.kill(grid.pid if victim == "grid" else workers[0], signal.SIGKILL)
            assert wait_for(lambda: not any(map(alive, workers)))
            said = grid.stderr.read()
        finally:
            grid.kill()
    if victim == "worker":
        assert grid.returncode == 1 and "a worker process was killed" in said
        assert "Traceback" not in said
