"""Over several processes the curve is that of one, whatever happens to them on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file

from tests.train.tiny import (
    HANG,
    SIGNALLED,
    assert_close,
    children,
    curve,
    errors,
    fields,
    join,
    pause,
    start_ranks,
    wait_for_lines,
    write_texts,
)

# forgetting, processes, shard. With "data" the gate's bias is kept whole beside d_1.
FORMS = [
    pytest.param("data", 2, 1, id="DDP on 2"),
    pytest.param("data", 2, "all", id="FSDP2 on 2"),
    pytest.param("none", 2, "all", id="FSDP2 on 2, no gate", marks=pytest.mark.slow),
    pytest.param("data", 4, 2, id="HSDP on 4", marks=pytest.mark.slow),
    pytest.param("none", 2, 1, id="DDP on 2, no gate", marks=pytest.mark.slow),
    pytest.param("data", 4, 1, id="DDP on 4", marks=pytest.mark.slow),
    pytest.param("data", 4, 4, id="FSDP2 on 4", marks=pytest.mark.slow),
    pytest.param("none", 4, 2, id="HSDP on 4, no gate", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("parallel") / "texts")


@pytest.fixture(scope="module")
def one_process(corpus, tmp_path_factory):
    """By forgetting, (recipe, the run of one process); made when it is asked for."""
    return cache(lambda kind: make_run(corpus, tmp_path_factory.mktemp(kind), forgetting=kind))


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """The same with more steps and checkpoints."""
    directory = tmp_path_factory.mktemp("run")
    options = {"steps": 16, "checkpoint_every": 3, "validate_every": 4}
    return make_run(corpus, directory, forgetting="data", **options)


def make_run(corpus: str, directory: Path, *, forgetting: str, **changes) -> tuple[Path, Path]:
    recipe, out = directory / "recipe.yaml", directory / "one"
    plain = fields(corpus, **{"rows": 1, "steps": 6, "validate_every": 3, **changes})
    plain["model"]["forgetting"] = forgetting
    recipe.write_text(json.dumps(plain))
    assert join(start_ranks(recipe, out, 1)) == [0]
    return recipe, out


@pytest.mark.parametrize(("forgetting", "world", "shard"), FORMS)
def test_every_form_has_the_curve_of_one_process(forgetting, world, shard, one_process, tmp_path):
    recipe, one = one_process(forgetting)
    out = tmp_path / "out"
    assert join(start_ranks(recipe, out, world, f"parallel.shard={shard}")) == [0] * world
    assert_close(curve(out), curve(one))
    weights, expected = (load_file(d / "model" / "model.safetensors") for d in (out, one))
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        assert (value - expected[name]).abs().max() < 2e-5, name  # Adam divides by small numbers
    for rank in range(1, world):
        assert errors(out, rank).read_text() == ""  # one process speaks


@pytest.mark.slow
@pytest.mark.parametrize("forgetting", ["data", "none"])
@pytest.mark.parametrize("shard", [1, 2])
def test_two_processes_with_a_row_each_are_bit_equal_to_one(
    shard, forgetting, one_process, tmp_path
):
    """a + b = b + a, and nothing else differs, but for the order of the sum in a norm."""
    recipe, _ = one_process(forgetting)
    options = ("train.batch_rows=2", "train.optimizer.clip=null", f"parallel.shard={shard}")
    assert join(start_ranks(recipe, tmp_path / "two", 2, *options)) == [0, 0]
    assert join(start_ranks(recipe, tmp_path / "one", 1, *options[:2])) == [0]
    two, one = curve(tmp_path / "two"), curve(tmp_path / "one")
    for line in (*two, *one):
        line.pop("grad_norm", None)
    assert two == one


STOPPED_IN_VALIDATION = """
import os, signal
from osdn.train import trainer as run
original = run.bits_per_byte
def interrupted(*args, **options):
    os.kill(os.getpid(), signal.SIGTERM)
    return original(*args, **options)
run.bits_per_byte = interrupted
"""


@pytest.mark.slow
def test_a_stop_in_a_validation_saves_what_was_trained(run, tmp_path):
    recipe, one = run
    out = tmp_path / "out"
    code = {1: STOPPED_IN_VALIDATION}
    processes = start_ranks(recipe, out, 2, "parallel.shard=2", rank_code=code)
    assert join(processes) == [143, 143]
    assert (out / "checkpoints" / "step_4").is_dir()
    assert join(start_ranks(recipe, out, 2, "parallel.shard=2")) == [0, 0]
    assert_close(curve(out), curve(one))


@pytest.mark.parametrize(
    "stops",  # processes, shard, after which step one of them gets a signal, which
    [[(2, "all", 5, 1)], pytest.param([(4, "all", 5, 2), (2, 1, 9, 1)], marks=pytest.mark.slow)],
    ids=["two", "four, then two"],
)
def test_a_stopped_run_is_resumed_by_fewer_processes(stops, run, tmp_path):
    recipe, one = run
    out = tmp_path / "out"
    for world, shard, step, stopped in stops:
        waiting = {stopped: pause(step, SIGNALLED)}
        processes = start_ranks(recipe, out, world, f"parallel.shard={shard}", rank_code=waiting)
        wait_for_lines(out, step, processes[0])
        os.kill(processes[stopped].pid, signal.SIGTERM)  # to one of them, and all agree
        assert join(processes) == [143] * world
        logged = [line["step"] for line in curve(out) if line["kind"] == "train"]
        assert (out / "checkpoints" / f"step_{logged[-1]}").is_dir() and logged[-1] < 16
    assert join(start_ranks(recipe, out, 1)) == [0]
    assert_close(curve(out), curve(one))


TRACED = """
import functools, torch
torch.compile = functools.partial(torch.compile, backend="eager")  # all but the slow part
"""


@pytest.mark.slow
@pytest.mark.parametrize("shard", [1, 2])
def test_compiled_blocks_that_are_made_again_change_nothing(shard, run, tmp_path):
    recipe, one = run
    out = tmp_path / "out"
    options = ("train.compile=true", "train.activation_checkpointing=full", "train.rows=2")
    processes = start_ranks(
        recipe, out, 2, *options, f"parallel.shard={shard}", rank_code={0: TRACED, 1: TRACED}
    )
    assert join(processes) == [0, 0]
    assert_close(curve(out), curve(one))


DTYPES = """
import torch
from osdn.layers import osdn as layers
operands, start = layers.OSDN.operands, layers.OSDN.start_precond
def checked_operands(self, x, *args, **options):
    assert x.dtype == self.q_proj.weight.dtype == torch.bfloat16, (x.dtype, self.q_proj.weight)
    assert self.gamma_proj.bias.dtype == torch.float32
    return operands(self, x, *args, **options)
def checked_start(self):
    assert start(self).dtype == torch.float32
    return start(self)
layers.OSDN.operands, layers.OSDN.start_precond = checked_operands, checked_start
"""


@pytest.mark.slow
def test_bfloat16_in_compute_with_float32_where_it_matters(run, tmp_path):
    recipe, one = run
    out = tmp_path / "out"
    options = ("train.precision=bfloat16", "train.activation_checkpointing=selective",
               "logging.precond_every=5", "parallel.shard=2")  # fmt: skip
    processes = start_ranks(recipe, out, 2, *options, rank_code={0: DTYPES, 1: DTYPES})
    assert join(processes) == [0, 0]
    lines = curve(out)
    measured = [line for line in lines if line["kind"] == "precond"]
    assert [line["step"] for line in measured] == [5, 10, 15]
    assert all(len(line[name]) == 2 for line in measured for name in ("dot", "beta_dot", "clipped"))
    plain = [line for line in lines if line["kind"] != "precond"]
    assert [line["step"] for line in plain] == [line["step"] for line in curve(one)]
    for line, exact in zip(plain, curve(one)):
        for name in {"loss", "bits_per_byte"} & line.keys():
            assert line[name] == pytest.approx(exact[name], rel=0.02)
    weights = load_file(out / "model" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    d = weights["model.layers.0.attn.initial_precond"]
    assert not torch.equal(d, d.bfloat16().float())  # learned, and not in bfloat16's steps


@pytest.mark.slow
def test_torchrun_restarts_after_a_kill_of_one_process(run, tmp_path):
    recipe, one = run
    out, random = tmp_path / "out", Random(0)
    after = random.randrange(1, 14)
    script = tmp_path / "run.py"
    first = "os.environ['TORCHELASTIC_RESTART_COUNT'] != '0'"  # the first attempt waits for ever
    script.write_text(pause(after, first) + "import sys\nfrom osdn.cli.main import main\n"
                      "if __name__ == '__main__':\n    sys.exit(main())\n")  # fmt: skip
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=2",
            "--standalone", "--monitor-interval=0.1", str(script), "train", str(recipe),
            "--out", str(out), "parallel.shard=all"]  # fmt: skip
    with (tmp_path / "err").open("wb") as err:
        agent = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=err)
    log, limit = out / "log.jsonl", time.monotonic() + HANG
    while agent.poll() is None and time.monotonic() < limit:
        if log.exists() and log.read_bytes().count(b"\n") >= after:
            break
        time.sleep(0.005)
    workers = set(children(agent.pid))
    os.kill(random.choice(sorted(workers)), signal.SIGKILL)
    while agent.poll() is None and not set(children(agent.pid)) - workers:
        assert time.monotonic() < limit
        time.sleep(0.05)
    shown, _ = agent.communicate(timeout=HANG)
    assert agent.returncode == 0 and shown.startswith(b"16 steps, ")
    assert shown.count(b"16 steps, ") == 1
    assert_close(curve(out), curve(one))


SMALL_FILES = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
"""


@pytest.mark.slow
def test_the_full_disk_of_one_process_loses_the_saves_alone(run, tmp_path):
    recipe, one = run
    out = tmp_path / "out"
    processes = start_ranks(recipe, out, 2, "parallel.shard=2", rank_code={1: SMALL_FILES})
    assert join(processes) == [0, 0]
    told = errors(out, 0).read_text()
    for step in (3, 6, 9, 12, 15, 16):
        assert told.count(f"WARNING: no checkpoint at step {step}: File too large") == 1
    assert not list(out.rglob("*step_*"))
    assert_close(curve(out), curve(one))


@pytest.mark.slow
def test_a_damaged_share_makes_all_processes_go_back(run, tmp_path):
    recipe, one = run
    out = tmp_path / "out"
    assert join(start_ranks(recipe, out, 2, "parallel.shard=2")) == [0, 0]
    share = next((out / "checkpoints" / "step_16").glob("shard-00002-*"))
    data = bytearray(share.read_bytes())
    data[len(data) // 2] ^= 1
    share.write_bytes(data)
    shutil.rmtree(out / "model")
    assert join(start_ranks(recipe, out, 2, "parallel.shard=2")) == [0, 0]
    told = errors(out, 0).read_text()
    assert "step_16 is damaged" in told and "resuming from" in told and "step_15" in told
    assert_close(curve(out), curve(one))


STALL = """
import pathlib, time
from osdn.data import RankRows
original, calls = RankRows.__next__, []
def slow(self):
    calls.append(self)
    if len(calls) == 5:
        while "reading rows" not in pathlib.Path(TOLD).read_text():  # until it is named
            time.sleep(0.05)
    return original(self)
RankRows.__next__ = slow
"""


@pytest.mark.slow
def test_a_process_that_stalls_is_named(run, tmp_path):
    recipe, one = run
    out = tmp_path / "out"
    code = f"TOLD = {str(errors(out, 0))!r}\n{STALL}"
    processes = start_ranks(recipe, out, 2, "parallel.stall_seconds=3", rank_code={1: code})
    assert join(processes) == [0, 0]
    told = [line for line in errors(out, 0).read_text().splitlines() if "stalls" in line]
    # A busy machine may delay others as well, and those are named too.
    (line,) = (line for line in told if "reading rows" in line)
    assert f"rank 1 (host {os.uname().nodename}, pid {processes[1].pid}) stalls" in line
    assert "at step 3, reading rows; the others wait for it" in line
    assert_close(curve(out), curve(one))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.batch_rows=3", "train.batch_rows: 3 is no multiple of the 2 rows of a forward"),
        ("parallel.shard=3", "parallel.shard: 3 does not divide the 2 processes of this run"),
        ("model.vocab_size=9", "model.vocab_size: 9 is too small"),
    ],
)
def test_what_does_not_fit_the_processes_is_one_line(override, expected, run, tmp_path):
    out = tmp_path / "out"
    assert join(start_ranks(run[0], out, 2, override)) == [1, 1]
    assert errors(out, 0).read_text().startswith(f"osdn train: {expected}")
    assert errors(out, 0).read_text().count("\n") == 1
