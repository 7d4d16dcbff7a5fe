"""What happens to a run from outside: its directory, log, checkpoints and environment."""

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from osdn.errors import UserError
from osdn.system.files import sha256
from osdn.train import train
from osdn.train.step import Stepper
from tests.train.tiny import curve, recipe


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("at", [1, 4, 12])  # before the first save, between, at the last step
def test_a_run_whose_directory_is_removed_stops_and_touches_nothing(
    at, anew, texts, tmp_path, monkeypatch
):
    original, out = Stepper.__call__, tmp_path / "run"

    def removed(self, step, *args, **options):
        if step == at:
            while out.exists():  # an old checkpoint may be on its way out at the same time
                shutil.rmtree(out, ignore_errors=True)
            if anew:  # as another run would have it
                out.mkdir()
                (out / ".train.lock").touch()
        return original(self, step, *args, **options)

    monkeypatch.setattr(Stepper, "__call__", removed)
    with pytest.raises(UserError, match="the directory was removed or replaced") as caught:
        train(recipe(texts), out)
    assert "\n" not in str(caught.value)
    assert not out.exists() or os.listdir(out) == [".train.lock"]


def lines_of(path):
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("step", [10, 12])  # resumed from
def test_a_bad_line_within_the_log_costs_that_line_only(step, run, finished, texts, capsys):
    if step == 10:
        shutil.rmtree(run / "checkpoints" / "step_12")
    log = run / "log.jsonl"
    lines = lines_of(log)
    lines[3] = lines[3].replace(b"kind", b"k\xffnd")
    log.write_bytes(b"".join(lines))
    train(recipe(texts), run)
    told = capsys.readouterr().err
    assert "line 4 is not what a run writes; the file is kept as log.jsonl.damaged" in told
    assert (run / "log.jsonl.damaged").read_bytes() == b"".join(lines)
    expected = curve(finished.out)
    assert curve(run) == expected[:3] + expected[4:]


def test_a_last_line_that_a_kill_cut_off_is_dropped_in_silence(run, finished, texts, capsys):
    shutil.rmtree(run / "checkpoints" / "step_12")
    with (run / "log.jsonl").open("ab") as file:
        file.write(b'{"kind": "train", "st')
    train(recipe(texts), run)
    assert "log.jsonl" not in capsys.readouterr().err.replace(str(run), "")
    assert curve(run) == curve(finished.out)


@pytest.mark.parametrize(
    ("keep", "expected"), [(None, "the log is missing or empty"), (7, "the log ends at step 6")]
)
def test_a_log_that_is_behind_its_checkpoint_is_told(keep, expected, run, texts, capsys):
    log = run / "log.jsonl"
    if keep is None:
        log.unlink()
    else:
        log.write_bytes(b"".join(lines_of(log)[:keep]))
    train(recipe(texts), run)
    told = capsys.readouterr().err
    assert f"expected lines up to step 12, and {expected}; the lines between are lost" in told


def rewrite(directory, name, content):
    """Change a file of a checkpoint, and its digest, as somebody who means it would."""
    (directory / name).write_text(content)
    digests = json.loads((directory / "manifest.json").read_text())
    digests[name] = sha256(directory / name)
    (directory / "manifest.json").write_text(json.dumps(digests))


@pytest.mark.parametrize("name", ["step_0099", "step_99", "step_9"])
def test_a_checkpoint_under_another_steps_name_is_refused(name, run, texts):
    (run / "checkpoints" / "step_12").rename(run / "checkpoints" / name)
    if name == "step_9":
        shutil.rmtree(run / "checkpoints" / "step_10")
    before = sorted(os.listdir(run / "checkpoints"))
    with pytest.raises(UserError, match=rf"{name}: expected step_12, since its state"):
        train(recipe(texts), run)
    assert sorted(os.listdir(run / "checkpoints")) == before


def test_a_checkpoint_past_the_last_step_is_refused(run, texts):
    directory = run / "checkpoints" / "step_12"
    state = json.loads((directory / "state.json").read_text())
    rewrite(directory, "state.json", json.dumps({**state, "step": 99}))
    directory.rename(run / "checkpoints" / "step_99")
    with pytest.raises(UserError, match=r"expected at most train\.steps=12 steps, found 99"):
        train(recipe(texts), run)
    assert sorted(os.listdir(run / "checkpoints")) == ["step_10", "step_99"]


@pytest.mark.parametrize("name", ["step_²", "step_1e3", "step_-1", "step_" + "9" * 400])
def test_names_that_only_look_like_a_step_are_passed_over(name, run, finished, texts):
    if len(name) < 250:
        (run / "checkpoints" / name).mkdir()
    train(recipe(texts), run)
    assert curve(run) == curve(finished.out)


def change(state, *path, to):
    """A copy of nested plain values with one of them replaced, or removed."""
    state = json.loads(json.dumps(state))
    inner = state
    for name in path[:-1]:
        inner = inner[name]
    if to is KeyError:
        del inner[path[-1]]
    else:
        inner[path[-1]] = to
    return state


LANE = ("data", 0, "streams", 0, "lanes", 0)
STATES = {
    "null": None,
    "a step that is a text": (("step",), "12"),
    "a step below 0": (("step",), -1),
    "a fraction": (("step",), 12.5),
    "no data": (("data",), []),
    "data that is none": (("data", 0), {}),
    "no streams": (("data", 0, "streams"), []),
    "no lanes": (("data", 0, "streams", 0, "lanes"), []),
    "a row far away": (("data", 0, "streams", 0, "next"), 10**15),
    "another lane": ((*LANE, "lane"), 7),
    "a lane's row far away": ((*LANE, "row"), 10**15),
    "no documents": ((*LANE, "documents"), {}),
    "no position": ((*LANE, "documents", "position"), KeyError),
    "a position of text": ((*LANE, "documents", "position"), ["a", "b"]),
    "a position below 0": ((*LANE, "documents", "position"), [0, -5, None, 0]),
    "an epoch of text": ((*LANE, "documents", "epoch"), "0"),
    "a token of text": ((*LANE, "token"), "0"),
}


@pytest.mark.parametrize("what", STATES.values(), ids=STATES)
def test_a_state_that_no_run_writes_is_one_line(what, run, texts):
    directory = run / "checkpoints" / "step_10"  # so that rows are still to be read
    shutil.rmtree(run / "checkpoints" / "step_12")
    state = json.loads((directory / "state.json").read_text())
    forged = what and change(state, *what[0], to=what[1])
    rewrite(directory, "state.json", json.dumps(forged))
    with pytest.raises(UserError) as caught:
        train(recipe(texts), run)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert not (run / "model").exists()


def reshaped(tensors, header):
    tensors["model.model.norm.weight"] = torch.ones(7)
    return tensors, header


def half(tensors, header):
    tensors["model.model.norm.weight"] = torch.ones(16)
    return tensors, header


def rounded(tensors, header):
    tensors["model.model.norm.weight"] = torch.ones(32).bfloat16()
    return tensors, header


def moved(tensors, header):
    return tensors, header.replace('"saved_offsets": [0]', '"saved_offsets": [1]')


HEADERS = {
    "another shape": reshaped,
    "half a tensor": half,
    "another dtype": rounded,
    "a tensor less": lambda t, h: ({k: v for k, v in t.items() if "norm" not in k}, h),
    "a tensor more": lambda t, h: ({**t, "more": torch.ones(1)}, h),
    "offsets past the end": moved,
    "offsets of text": lambda t, h: (t, h.replace("[0]", '["0"]')),
    "no offsets": lambda t, h: (t, "{}"),
    "a header that is no JSON": lambda t, h: (t, "{"),
    "a header of brackets": lambda t, h: (t, "[" * 50_000),
    "a null": lambda t, h: (t, "null"),
    "no header": lambda t, h: (t, None),
}


@pytest.mark.parametrize("forge", HEADERS.values(), ids=HEADERS)
def test_tensors_that_are_not_the_models_are_one_line(forge, run, texts):
    directory = run / "checkpoints" / "step_12"
    (path,) = directory.glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    key = next(name for name, value in metadata.items() if "saved_offsets" in value)
    tensors, header = forge(tensors, metadata.pop(key))
    save_file(tensors, path, metadata if header is None else {**metadata, key: header})
    digests = json.loads((directory / "manifest.json").read_text())
    digests[path.name] = sha256(path)
    (directory / "manifest.json").write_text(json.dumps(digests))
    with pytest.raises(UserError) as caught:
        train(recipe(texts), run)
    assert "\n" not in str(caught.value) and str(directory) in str(caught.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"RANK": "abc"}, "RANK: expected a number in the environment"),
        ({"RANK": "-1"}, "RANK: expected a number"),
        ({"WORLD_SIZE": "٣"}, "WORLD_SIZE: expected a number"),
        ({"WORLD_SIZE": "0"}, "expected a rank below the number of processes, got 0 of 0"),
        ({"RANK": "2"}, "expected a rank below the number of processes, got 2 of 1"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT: expected a number"),
    ],
)
def test_an_environment_that_is_not_torchruns_is_one_line(
    values, expected, texts, tmp_path, monkeypatch
):
    given = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in {**given, **values}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=expected):
        train(recipe(texts), tmp_path / "run")


def test_tensorboard_without_a_place_is_one_line(texts, finished, tmp_path, capsys):
    base = recipe(texts)
    asked = base.model_copy(
        update={"logging": base.logging.model_copy(update={"tensorboard": True})}
    )
    (tmp_path / "tensorboard").touch()  # no directory can be made there
    train(asked, tmp_path)
    told = capsys.readouterr().err
    assert told.count("TensorBoard: ") == 1 and "File exists; it gets nothing" in told
    assert "Traceback" not in told and curve(tmp_path) == curve(finished.out)


def test_without_a_terminal_a_line_comes_at_once_and_every_so_often(
    texts, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("osdn.train.log.progress.INTERVAL", 0.0)
    base = recipe(texts, steps=3)
    asked = base.model_copy(update={"logging": base.logging.model_copy(update={"progress": True})})
    train(asked, tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"{tmp_path}: ") and lines[0].endswith(" on cpu: step 0 of 3")
    shown = [line for line in lines if line.startswith("step ") and " of 3: loss " in line]
    assert [line.split(" of ")[0] for line in shown] == ["step 1", "step 2", "step 3"]
