"""What every evaluation leaves behind: one JSON object that says what was measured, and on what.

task, protocol      what was done; only results that agree in both may stand in one table
model               name and sizes, or null where the task trains its own
samples             how many items the scores stand on
scores              [{group, name, value, low, high, n}]: a mean and its 95% bootstrap interval
tables              [{title, columns, rows}]
curves              [{title, x, y, series: {label: [[x, y, low, high], ...]}}], or, shares as dots,
                    [{title, x, strip: True, series: {label: [value, ...]}}], or, differences,
                    [{title, x, differences: True, series: {label: {values, interval}}}]
maps                [{title, x, y, columns, rows, values}]: values[row][column]
provenance          command, commit, versions, hardware, time
"""

import html
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from osdn.errors import UserError
from osdn.system import files
from osdn.system.outside import Malformed, Outside, read_json

RESULT = "result.json"
RESAMPLES = 2000  # the interval's ends are then its 50th values from either end
LARGEST_EXPONENT = 709.0  # e to the 709 is the last that a float holds
PACKAGES = ("osdn", "torch", "transformers", "numpy", "numba", "triton", "lm-eval", "datasets")


def bootstrap(
    values: Sequence[float], weights: Sequence[float] | None = None
) -> tuple[float, float]:
    """The percentile bootstrap's 95% interval of Σ values / Σ weights, over resampled items.

    Without weights that is the mean. 2,000 resamples, seed 0.
    """
    x = np.asarray(values, dtype=np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    rng = np.random.default_rng(0)
    # Resamples at a time: at most 4 million indices.
    rows = max(1, 2**22 // len(x))
    ratios = []
    for start in range(0, RESAMPLES, rows):
        chosen = rng.integers(len(x), size=(min(rows, RESAMPLES - start), len(x)))  # [rows, items]
        ratios.append(x[chosen].sum(1) / w[chosen].sum(1))
    low, high = np.quantile(np.concatenate(ratios), [0.025, 0.975])
    return float(low), float(high)


def exp(x: float) -> float:
    """e to the x; infinity where floats end, as after a training that diverged."""
    return math.inf if x > LARGEST_EXPONENT else math.exp(x)


def score(
    name: str,
    values: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    group: str = "",
    scale: Callable[[float], float] = float,
) -> dict[str, Any]:
    """One entry of `scores`: scale(Σ values / Σ weights) with its interval; n items.

    Args:
        values: one an item.  weights: what their sum is divided by, one an item; None: the mean.
        scale: an increasing function that turns the ratio into what is reported, such as exp.

    Raises:
        UserError: no values.
    """
    if not len(values):
        raise UserError(f"{group or name}: nothing to average; the evaluation has no sample")
    total = float(len(values)) if weights is None else float(np.sum(weights))
    # Numerator and denominator by the same draw: a ratio's interval, not a mean of ratios'.
    low, high = bootstrap(values, weights)
    return {
        "group": group,
        "name": name,
        "value": scale(float(np.sum(values)) / total),
        # An increasing scale carries quantiles over.
        "low": scale(low),
        "high": scale(high),
        "n": len(values),
    }


def point(x: float, one: dict[str, Any]) -> list[float]:
    """A score as a point of a curve: [x, value, low, high]."""
    return [x, one["value"], one["low"], one["high"]]


def as_text(x: Any) -> str:
    """What Markdown shows as it is and on one line: no HTML in it, whatever it is called."""
    return html.escape(" ".join(str(x).splitlines()), quote=False)


def as_code(x: Any) -> str:
    """A code span, in which HTML is text; a backtick would end it and becomes a quote."""
    return "`" + " ".join(str(x).splitlines()).replace("`", "'") + "`"


def markdown(table: dict[str, Any]) -> str:
    """A table of a result in Markdown; a cell's bars and line breaks end no cell and no row."""

    def cell(x: Any) -> str:
        return as_text(x).replace("|", r"\|")

    lines = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def provenance() -> dict[str, Any]:
    """Command, git commit, versions, hardware and time of this process."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    # A command that can be given again, whichever way it was started.
    program = Path(sys.argv[0])  # "osdn", or the package's __main__.py under python -m
    command = [(program.parent if program.stem == "__main__" else program).name, *sys.argv[1:]]
    return {
        "command": shlex.join(command),
        "commit": _commit(),
        "versions": versions,
        "hardware": _hardware(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    """The commit of the source tree, "+changes" where it differs from it; None outside of one."""
    # The commit of this source tree, not of the directory that the user is in.
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head, changes = (
            subprocess.run(
                ["git", *words], cwd=root, check=True, capture_output=True, text=True
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changes else "")


def _hardware() -> dict[str, Any]:
    """The processor, its usable cores, memory, and the GPU if PyTorch sees one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": cores, "threads": torch.get_num_threads(), "gpu": gpu}


def make_result(
    task: str,
    *,
    protocol: dict[str, Any],
    model: dict[str, Any] | None,
    samples: int,
    scores: list[dict[str, Any]],
    tables: Sequence[dict[str, Any]] = (),
    curves: Sequence[dict[str, Any]] = (),
    maps: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """The object that the module's docstring describes."""
    return {
        "task": task,
        "protocol": protocol,
        "model": model,
        "samples": samples,
        "scores": scores,
        "tables": list(tables),
        "curves": list(curves),
        "maps": list(maps),
        "provenance": provenance(),
    }


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all.

    Raises:
        UserError: the disk does not take it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, value)
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror or error}") from error


Number = float | None


class Score(Outside):
    """One of a result's scores."""

    group: str
    name: str
    value: Number
    low: Number
    high: Number
    n: int


class Table(Outside):
    """One of a result's tables."""

    title: str
    columns: list[Any]
    rows: list[list[Any]]


class Differences(Outside):
    """Values and the interval of their mean."""

    values: list[Number]
    interval: list[Number]


class Curve(Outside):
    """One of a result's curves: points [x, y, low, high]; values (`strip`); or `differences`."""

    title: str
    x: str
    y: str = ""
    strip: bool = False
    differences: bool = False
    series: dict[str, list[Number] | list[list[Number]] | Differences]


class Map(Outside):
    """One of a result's maps."""

    title: str
    x: str
    y: str
    columns: list[Any]
    rows: list[Any]
    values: list[list[Number]]


class Machine(Outside):
    """Where it was measured."""

    gpu: str | None


class Provenance(Outside):
    """See `provenance`."""

    command: str
    versions: dict[str, str]
    hardware: Machine


class Measured(Outside):
    """What was measured."""

    name: str


class Result(Outside):
    """A result, as the module's docstring describes it."""

    task: str
    protocol: dict[str, Any]
    model: Measured | None
    samples: int
    scores: list[Score]
    tables: list[Table]
    curves: list[Curve]
    maps: list[Map]
    provenance: Provenance


def read_result(path: Path) -> dict[str, Any]:
    """A result from its file, or from the directory that holds it.

    Raises:
        UserError: none there, or not one.
    """
    file = path / RESULT if path.is_dir() else path
    try:
        result = read_json(file, Result).model_dump(exclude_unset=True)
    except OSError as error:
        raise UserError(
            f"{path}: expected an evaluation's directory with {RESULT} in it; is the evaluation "
            "finished? Run it again and it goes on"
        ) from error
    except Malformed as error:
        raise UserError(f"{file}: not an evaluation's result: {error.reason}") from error
    return result
