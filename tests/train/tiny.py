"""A run of a few seconds: its recipe, its text, and what of its log must repeat bit for bit."""

import json
import multiprocessing
import socket
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from osdn.train import Recipe

HANG = 1800.0  # seconds after which a test gives up; a slow machine needs a tenth of them
WORDS = ["the", "delta", "rule", "writes", "what", "memory", "does", "not", "know", "yet", "ä"]


# Processes are forked from a server that has imported the package and done nothing else, so that
# many can be started, and killed, in a few seconds.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["osdn.cli.train", "osdn.ops.numba"])


def pause(step: int, until: str) -> str:
    """Code after which a run waits between steps, `step` of them done, until an expression holds.

    What a test does to the run then finds it there, however slow either of the two is. The
    expression may use os and the loop's `signals`.
    """
    return (
        "import os, time\n"
        "from osdn.train.trainer import Trainer\n"
        "asked = Trainer._asked\n"
        "def wait(self, signals):\n"
        f"    while self.step == {step} and not ({until}):\n"
        "        time.sleep(0.005)\n"
        "    return asked(self, signals)\n"
        "Trainer._asked = wait\n"
    )


SIGNALLED = "signals.received"


def start(recipe: Path, out: Path, code: str = "") -> Any:
    """A process that runs `code` and does what the console command does."""
    line = ["train", str(recipe), "--out", str(out)]
    code += f"\nimport sys; from osdn.cli.main import main; sys.exit(main({line!r}))"
    process = context.Process(target=exec, args=(code, {}))
    process.start()
    return process


def start_ranks(
    recipe: Path, out: Path, world: int, *overrides: str, rank_code: dict[int, str] | None = None
) -> list[Any]:
    """Processes that do what torchrun's do, each with its errors in out-RANK.err.

    rank_code: what some of them run before.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        line = ["train", str(recipe), "--out", str(out), *overrides]
        place = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        code = (
            f"import os, sys; os.environ.update({ {k: str(v) for k, v in place.items()}!r})\n"
            f"sys.stderr = open({str(errors(out, rank))!r}, 'a', buffering=1)\n"
            f"{(rank_code or {}).get(rank, '')}\n"
            f"from osdn.cli.main import main; sys.exit(main({line!r}))"
        )
        process = context.Process(target=exec, args=(code, {}))
        process.start()
        processes.append(process)
    return processes


def errors(out: Path, rank: int) -> Path:
    """Where a process of start_ranks writes what it has to say."""
    return out.with_name(f"{out.name}-{rank}.err")


def join(processes: list[Any], seconds: float = HANG) -> list[int]:
    """The exit codes; processes that do not end are killed, and the test fails."""
    limit = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, limit - time.monotonic()))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
    assert not late
    return [process.exitcode for process in processes]


def wait_for_lines(out: Path, lines: int, process: Any) -> None:
    """Until the log has that many lines, or the run ended."""
    log = out / "log.jsonl"
    limit = time.monotonic() + HANG
    while process.is_alive() and time.monotonic() < limit:
        if log.exists() and log.read_bytes().count(b"\n") >= lines:
            return
        time.sleep(0.002)


def assert_close(curve: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """The same lines, numbers within 3e-6: the sums of gradients are in another order, and how much
    float32 rounds then depends on the processor (1.02e-6 was seen)."""
    assert [line.keys() for line in curve] == [line.keys() for line in expected]
    for line, wanted in zip(curve, expected):
        assert line == {
            k: pytest.approx(v, rel=3e-6) if isinstance(v, float) else v for k, v in wanted.items()
        }


def write_texts(directory: Path, documents: int = 60) -> str:
    """Text files of random words; returns the corpus' name."""
    directory.mkdir(parents=True, exist_ok=True)
    random = Random(0)
    for i in range(documents):
        text = " ".join(random.choices(WORDS, k=random.randint(3, 60)))
        (directory / f"{i:02}.txt").write_text(text, encoding="utf-8")
    return str(directory)


def recipe(corpus: str, **changes: Any) -> Recipe:
    """A model of two layers for 12 steps; `changes` are fields of train."""
    return Recipe.model_validate(fields(corpus, **changes))


def fields(corpus: str, **changes: Any) -> dict[str, Any]:
    """The recipe as plain values."""
    train = {
        "steps": 12,
        "seq_len": 48,
        "rows": 2,
        "batch_rows": 4,
        "device": "cpu",
        "validate_every": 4,
        "checkpoint_every": 2,
        "optimizer": {"lr": 1e-2},
        "schedule": {"warmup_steps": 3},
    }
    return {
        "model": {
            "hidden_size": 32,
            "num_heads": 2,
            "num_hidden_layers": 2,
            "intermediate_size": 48,
            "precond_min": 0.0,
            "precond_max": 2.0,
        },
        "data": {
            "corpus": corpus,
            "validation": 0.2,
            "validation_bytes": 600,
            "shuffle_bytes": 2000,
        },
        "train": {**train, **changes},
        "logging": {"tensorboard": False, "progress": False},
    }


TIMINGS = ("seconds", "tokens_per_s", "peak_memory", "mfu")


def curve(out: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl without the timings: what must repeat bit for bit."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def children(pid: int) -> list[int]:
    """The processes that it started."""
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
