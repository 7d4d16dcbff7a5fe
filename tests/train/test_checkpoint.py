"""Damaged checkpoints are passed over, those that may hold code refused, a full disk is told."""

import errno
import io
import json
import os
import pickle
import resource
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from osdn import OSDNConfig, OSDNForCausalLM
from osdn.errors import UserError
from osdn.train import Recipe, train
from osdn.train.checkpoint import reading as checkpoint
from osdn.train.checkpoint import writing as saving
from osdn.train.distributed.parallel import Parallel
from osdn.train.optim import fill_state, make_optimizer, named_state
from osdn.train.recipe import Optimizer
from tests.train.tiny import curve, recipe


def newest(run: Path) -> Path:
    return run / "checkpoints" / "step_12"


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_checkpoint_from_before_state_decay_is_read(tmp_path):
    """Its recipe has no such field, and its gate of APF another name."""
    before = Path("tests/fixtures/before_state_decay")
    shutil.copytree(before / "step_3", tmp_path / "step_3")
    saved = json.loads((before / "step_3" / "recipe.json").read_text())
    fields = {k: v for k, v in saved["model"].items() if v is not None}
    recipe = Recipe.model_validate(saved | {"model": fields})
    found = checkpoint.load_newest(tmp_path, recipe.resolved(), print)
    model = OSDNForCausalLM(OSDNConfig(**fields | {"vocab_size": 258}))
    optimizer = make_optimizer(model, Optimizer())
    fill_state(optimizer, 3)
    parallel = Parallel(recipe, torch.device("cpu"))
    checkpoint.load_tensors(found.directory, named_state(model, optimizer), parallel)
    written = load_file(before / "model" / "model.safetensors")
    for name, x in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            assert torch.equal(x, written[name.replace("gamma_proj", "a_proj")]), name
    moments = optimizer.state[model.model.layers[1].attn.gamma_proj.weight]
    assert moments["exp_avg"].any() and moments["exp_avg_sq"].any()
    other = Recipe.model_validate(saved | {"model": fields | {"state_decay": "data"}}).resolved()
    with pytest.raises(UserError, match=r"model\.state_decay: .* was made with None"):
        checkpoint.load_newest(tmp_path, other, print)


SHARD = "shard-00001-model-00001-of-00001.safetensors"
DAMAGE = {
    "a flipped bit in the weights": lambda d: flip_a_bit(d / SHARD),
    "a flipped bit in the state": lambda d: flip_a_bit(d / "state.json"),
    "half a file": lambda d: os.truncate(d / SHARD, 1000),
    "a missing file": lambda d: (d / SHARD).unlink(),
    "another run's file": lambda d: (d / SHARD.replace("1-model", "2-model")).touch(),
    "no manifest": lambda d: (d / "manifest.json").unlink(),
    "an empty manifest": lambda d: (d / "manifest.json").write_text(""),
    "another recipe": lambda d: (d / "recipe.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(damage, run, finished, texts, capsys):
    damage(newest(run))
    train(recipe(texts), run)
    told = capsys.readouterr().err
    assert f"{newest(run)} is damaged" in told and "resuming from" in told and "step_10" in told
    assert curve(run) == curve(finished.out)
    assert (run / "checkpoints" / "step_12.damaged").is_dir()  # kept, for whoever wants to look
    assert train(recipe(texts), run).steps == 12


def test_with_every_checkpoint_damaged_nothing_is_overwritten(run, texts):
    log = (run / "log.jsonl").read_bytes()
    for directory in (run / "checkpoints").iterdir():
        flip_a_bit(directory / "state.json")
    for _ in range(2):
        with pytest.raises(UserError, match="damaged checkpoints and no whole one"):
            train(recipe(texts), run)
    assert (run / "log.jsonl").read_bytes() == log


def test_a_stray_file_is_no_checkpoint(run, finished, texts):
    (run / "checkpoints" / "step_40").touch()
    assert train(recipe(texts), run).steps == 12
    assert curve(run) == curve(finished.out)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (Path.unlink, r"it cannot be read \(No such file or directory\)"),
        (lambda log: os.truncate(log, 1000), r"line \d+ is not what a run writes"),
        (lambda log: log.write_text("7\n"), "line 1 is not what a run writes"),
    ],
)
def test_a_finished_run_without_its_whole_log_is_told_in_a_line(
    damage, expected, finished, texts, tmp_path
):
    shutil.copytree(finished.out, tmp_path / "run")
    damage(tmp_path / "run" / "log.jsonl")
    with pytest.raises(UserError, match=rf"log\.jsonl: .*{expected}; restore it") as caught:
        train(recipe(texts), tmp_path / "run")
    assert "\n" not in str(caught.value)


class Payload:
    """Unpickling it leaves a file: the sign that code was run."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["state.json", "recipe.json", SHARD])
def test_a_pickle_in_a_files_place_is_refused_and_not_run(name, run, texts, tmp_path):
    mark = tmp_path / "code ran"
    forged = newest(run) / name
    torch.save({"step": Payload(mark)}, forged)
    manifest = json.loads((newest(run) / "manifest.json").read_text())
    manifest[name] = checkpoint.sha256(forged)  # a forger would do this too
    (newest(run) / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="the checkpoint is refused"):
        train(recipe(texts), run)
    assert not mark.exists()
    torch.load(io.BytesIO(forged.read_bytes()), weights_only=False)
    assert mark.exists()  # the payload does work where it is let


@pytest.mark.parametrize("name", [".metadata", "optimizer.pkl", "pytorch_model.bin", "state.pt"])
def test_a_file_that_does_not_belong_is_refused(name, run, texts):
    (newest(run) / name).write_bytes(pickle.dumps({}))
    with pytest.raises(UserError, match="may hold code, as pickles do; the checkpoint is refused"):
        train(recipe(texts), run)


def test_a_full_disk_stops_nothing_but_the_save(texts, finished, tmp_path, monkeypatch, capsys):
    original, saves = saving._Writer.write_data, []

    def full(self, *arguments):
        saves.append(self.target)
        if len(saves) in (2, 3):
            (self.unfinished / SHARD).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self, *arguments)

    monkeypatch.setattr(saving._Writer, "write_data", full)
    train(recipe(texts, keep_checkpoints=9), tmp_path)
    told = capsys.readouterr().err
    assert "WARNING: no checkpoint at step 4: No space left on device" in told
    assert "step_2 is intact" in told
    names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step_2", "step_8", "step_10", "step_12"}
    assert curve(tmp_path) == curve(finished.out)


def test_what_a_kill_after_the_last_save_left_is_removed(texts, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished.out, run)
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    # Killed between the rename of the last checkpoint and the removal of an older one.
    shutil.rmtree(run / "model")
    shutil.copytree(run / "checkpoints" / kept[0], run / "checkpoints" / "step_2")
    train(recipe(texts), run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == kept


@pytest.fixture
def small_files():
    """Every write past 60 kB fails, as on a full disk: the log fits, weights do not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_files_that_cannot_grow_leave_the_training_whole(
    texts, finished, small_files, tmp_path, capsys
):
    with pytest.raises(UserError, match=r"cannot write the finished model: .*File too large"):
        train(recipe(texts), tmp_path)
    told = capsys.readouterr().err
    for step in range(2, 13, 2):  # each once
        assert told.count(f"WARNING: no checkpoint at step {step}: File too large") == 1
    assert curve(tmp_path) == curve(finished.out)
    assert not list(tmp_path.rglob("step_*"))


@pytest.fixture
def small_disk(tmp_path):
    """A real file system with room for one checkpoint, where this user may mount one."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a small tmpfs")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_disk_that_is_really_full(texts, finished, small_disk, capsys):
    train(recipe(texts), small_disk)  # the model alone still fits
    told = capsys.readouterr().err
    assert "no checkpoint at step 4: No space left on device; training continues" in told
    assert "step_2 is intact" in told
    assert [p.name for p in (small_disk / "checkpoints").iterdir()] == ["step_2"]
    assert curve(small_disk) == curve(finished.out)
    shutil.rmtree(small_disk / "model")
    with (small_disk / "filler").open("wb", buffering=0) as filler, suppress(OSError):
        while filler.write(bytes(4096)):
            pass
    with pytest.raises(UserError, match=r"cannot write the finished model: .*No space left"):
        train(recipe(texts), small_disk)
    assert "resuming from" in capsys.readouterr().err
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    train(recipe(texts), small_disk)  # the same command, once there is room
    assert curve(small_disk) == curve(finished.out)
