"""Training fed by workers, from text and shards: the same curve, also after signals."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from osdn.cli.main import main
from tests.train.tiny import HANG, SIGNALLED, curve, fields, pause, write_texts

STEPS = 16


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A recipe, and by corpus (text, shards) the curve of a whole run without workers."""
    directory = tmp_path_factory.mktemp("runs")
    texts, shards = write_texts(directory / "texts"), directory / "shards"
    recipe = directory / "recipe.yaml"
    recipe.write_text(json.dumps(fields(texts, steps=STEPS, validate_every=5)))
    line = ["tokenize", texts, "--tokenizer", "byte", "--out", str(shards), "--processes", "1"]
    assert main([*line, "--shard-tokens", "2000"]) == 0
    curves = {}
    for name, corpus in (("text", texts), ("shards", str(shards))):
        out = directory / name
        assert main(["train", str(recipe), f"data.corpus={corpus}", "--out", str(out)]) == 0
        curves[corpus] = curve(out)
    return recipe, curves


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "number"), [(0, signal.SIGKILL), (1, signal.SIGTERM)])
def test_interrupted_with_a_worker_the_curve_is_that_of_a_run_without(kind, number, made, tmp_path):
    recipe, curves = made
    corpus, expected = list(curves.items())[kind]
    line = ["train", str(recipe), "--out", str(tmp_path), f"data.corpus={corpus}"]
    waiting = pause(STEPS - 1, SIGNALLED) + "from osdn.cli.main import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys\n{waiting}", *line, "data.workers=1"], text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    while process.poll() is None and not list(tmp_path.glob("checkpoints/step_*")):
        time.sleep(0.005)
    if number == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, number)  # the worker too, as a scheduler does
    _, errors = process.communicate(timeout=HANG)  # until the worker, which has its stderr, is gone
    assert process.returncode == (143 if number == signal.SIGTERM else -number), errors
    assert len(curve(tmp_path)) < len(expected)
    assert main([*line, "data.workers=2"]) == 0  # another number of them, the same rows
    assert curve(tmp_path) == expected
