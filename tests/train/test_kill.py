"""Real processes, really killed: given again, the command ends with the uninterrupted curve."""

import json
import os
import signal
import subprocess
import sys
import time
from random import Random

import pytest

from osdn.errors import UserError
from osdn.train import load_recipe, train
from tests.train.tiny import (
    HANG,
    SIGNALLED,
    curve,
    fields,
    pause,
    start,
    wait_for_lines,
    write_texts,
)

STEPS = 40


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory):
    directory = tmp_path_factory.mktemp("kill")
    path = directory / "recipe.yaml"
    corpus = write_texts(directory / "texts")
    path.write_text(json.dumps(fields(corpus, steps=STEPS, checkpoint_every=3, validate_every=5)))
    return path


@pytest.fixture(scope="module")
def expected(recipe_path, tmp_path_factory):
    """The curve of a run that nobody interrupts."""
    out = tmp_path_factory.mktemp("uninterrupted")
    process = start(recipe_path, out)
    process.join(HANG)
    assert process.exitcode == 0
    return curve(out)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_moments_the_curve_is_that_of_an_uninterrupted_run(
    seed, recipe_path, expected, tmp_path
):
    random = Random(seed)
    for after in sorted(random.sample(range(1, STEPS), 4)):  # lines; a step writes one or two
        process = start(recipe_path, tmp_path, pause(STEPS - 1, "False"))
        wait_for_lines(tmp_path, after, process)
        time.sleep(random.random() * 0.05)  # any moment of the steps or saves that follow
        process.kill()  # SIGKILL
        process.join()
        assert process.exitcode == -signal.SIGKILL
    process = start(recipe_path, tmp_path)
    process.join(HANG)
    assert process.exitcode == 0
    assert curve(tmp_path) == expected
    assert (tmp_path / "model" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_polite_stop_saves_first(number, code, recipe_path, expected, tmp_path):
    process = start(recipe_path, tmp_path, pause(10, SIGNALLED))
    wait_for_lines(tmp_path, 10, process)
    os.kill(process.pid, number)
    process.join(HANG)
    assert process.exitcode == code
    steps = [int(p.name.removeprefix("step_")) for p in (tmp_path / "checkpoints").iterdir()]
    logged = [line["step"] for line in curve(tmp_path) if line["kind"] == "train"]
    assert max(steps) == logged[-1] < STEPS  # nothing that was computed is lost
    process = start(recipe_path, tmp_path)
    process.join(HANG)
    assert process.exitcode == 0 and curve(tmp_path) == expected


@pytest.mark.slow
def test_a_second_run_in_the_same_directory_is_refused(recipe_path, expected, tmp_path):
    out, told = tmp_path / "run", tmp_path / "told"
    process = start(recipe_path, out, pause(5, f"os.path.exists({str(told)!r})"))
    wait_for_lines(out, 5, process)
    with pytest.raises(UserError, match=rf"{out}: another process trains there"):
        train(load_recipe(recipe_path), out)
    told.touch()
    process.join(HANG)
    assert process.exitcode == 0 and curve(out) == expected
    assert train(load_recipe(recipe_path), out).steps == STEPS  # it is free again


@pytest.mark.slow
def test_the_console_command_killed_and_given_again(recipe_path, expected, tmp_path):
    words = ["train", str(recipe_path), "--out", str(tmp_path)]
    waiting = pause(STEPS - 1, "False") + "from osdn.cli.main import main; main()"
    process = subprocess.Popen([sys.executable, "-c", waiting, *words], stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob("checkpoints/step_*")):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    line = [sys.executable, "-m", "osdn", *words]
    done = subprocess.run(line, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0 and "resuming from" in done.stderr
    assert done.stdout.startswith(f"{STEPS} steps, ")
    assert curve(tmp_path) == expected
    line[5:5] = ["train.sed=1"]
    other = subprocess.run(line, capture_output=True, text=True, timeout=HANG)
    assert other.returncode == 1 and len(other.stderr.splitlines()) == 1
    assert "did you mean 'seed'?" in other.stderr
