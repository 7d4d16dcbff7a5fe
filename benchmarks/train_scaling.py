"""A recipe on one and on several GPUs of one machine: speed, memory, communication, loss curves.

    python benchmarks/train_scaling.py recipes/340m.yaml train.steps=100 --gpus 1,2 --out DIR

For each number of GPUs it starts torchrun with itself. The run is `osdn train`'s own, but for two
things: one step in the middle is profiled, and after the last one the run ends without a checkpoint
and a finished model. Runs that are there are not made again, only read, so that on two GPUs

    CUDA_VISIBLE_DEVICES=0 python benchmarks/train_scaling.py recipes/1.3b.yaml --gpus 1 --out A &
    CUDA_VISIBLE_DEVICES=1 python benchmarks/train_scaling.py recipes/340m.yaml --gpus 1 --out B

use both. The columns: tokens/s of the steps after the first ten; tokens/s of a GPU over those of
the first number of GPUs (strong scaling; weak with --rows-per-gpu); the share of the profiled step
in which NCCL's kernels run, waiting for other processes included, and in which nothing else runs;
the share of it in which the GPU that has least to do has something (far below 1: the host is late);
the largest difference of a step's loss to the first run's; what `osdn plan` says.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from osdn.plan.hardware import GIB, GPUS
from osdn.plan.predict import model_config, predict
from osdn.train import load_recipe
from osdn.train.log.speed import peak_memory
from osdn.train.loop import train
from osdn.train.recipe import Recipe
from osdn.train.trainer import Trainer

SETTLED = 10  # the first steps, which compile and fill caches, are not timed
Span = tuple[float, float]


def union(spans: Iterable[Span]) -> list[Span]:
    """The same set of moments as spans that do not touch, in order."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def length(spans: Iterable[Span]) -> float:
    """Of the union."""
    return sum(end - start for start, end in union(spans))


def communication(kernels: Iterable[tuple[str, Span]]) -> dict[str, float]:
    """Of a step's kernels by name: its length; the shares of it in which NCCL runs, and alone."""
    kernels = list(kernels)
    everything = [span for _, span in kernels]
    nccl = [span for name, span in kernels if name.lower().startswith("nccl")]
    others = [span for name, span in kernels if not name.lower().startswith("nccl")]
    if not everything:
        return {"seconds": 0.0, "nccl": 0.0, "alone": 0.0, "busy": 0.0}
    whole = max(end for _, end in everything) - min(start for start, _ in everything)
    busy = length(everything)
    return {
        "seconds": whole / 1e6,
        "nccl": length(nccl) / whole,
        "alone": (busy - length(others)) / whole,
        "busy": busy / whole,
    }


class Profiled(Trainer):
    """A run that profiles the GPU in step `at`, and leaves OUT/rank_R.json only."""

    def __init__(self, *given: Any, at: int) -> None:
        super().__init__(*given)
        self.at = at
        self.found = communication([])

    def train_step(self) -> str:
        if self.step + 1 != self.at or self.parallel.device.type != "cuda":
            return super().train_step()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            shown = super().train_step()
            torch.cuda.synchronize()
        self.found = communication(
            (event.name, (event.time_range.start, event.time_range.end))
            for event in profile.events()
            if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
        )
        return shown

    def save(self) -> None:
        found = {**self.found, "peak_memory": peak_memory(self.parallel.device)}
        (self.out / f"rank_{self.parallel.rank}.json").write_text(json.dumps(found))
        raise SystemExit(0)


def launch(args: argparse.Namespace, overrides: list[str], gpus: int, out: Path) -> None:
    """One run, unless its log has all steps."""
    recipe = load_recipe(args.recipe, overrides)
    resolved = recipe.resolved()
    if gpus == 1:
        del resolved["parallel"]  # DDP and FSDP2 are compared with the same run
    wanted, note = json.dumps(resolved), out / "recipe.json"
    if out.exists() and (not note.exists() or note.read_text() != wanted):
        sys.exit(f"{out}: holds another recipe's run; give another --out, or delete it")
    if len(steps(out)) >= recipe.train.steps:
        return
    out.mkdir(parents=True, exist_ok=True)
    note.write_text(wanted)
    words = [sys.executable, __file__, args.recipe, *overrides, "--out", str(out), "--train"]
    if gpus > 1:
        place = ["--master_addr=127.0.0.1", f"--master_port={29500 + os.getpid() % 1000}"]
        torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={gpus}", *place]
        words[1:1] = torchrun
    code = subprocess.run(words).returncode
    if len(steps(out)) < recipe.train.steps:
        sys.exit(f"{out}: the run on {gpus} GPUs ended early (exit code {code})")


def steps(out: Path) -> list[dict[str, Any]]:
    """The log's training steps."""
    log = out / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [line for line in found if line["kind"] == "train"]


def summary(
    recipe: Recipe, gpus: int, out: Path, first: list[dict[str, Any]], base: float | None
) -> tuple[str, float]:
    """(a line of the table, tokens/s a GPU)."""
    log = steps(out)
    speeds = [line["tokens_per_s"] for line in log[SETTLED:]] or [log[-1]["tokens_per_s"]]
    low, middle, high = quantiles(speeds, n=4) if len(speeds) > 1 else speeds * 3
    ranks = [json.loads(path.read_text()) for path in sorted(out.glob("rank_*.json"))]
    memory = max([line["peak_memory"] for line in log] + [rank["peak_memory"] for rank in ranks])
    shares = [max(rank[name] for rank in ranks) for name in ("nccl", "alone")]
    busy = min(rank["busy"] for rank in ranks)
    losses = [(a["loss"], b["loss"]) for a, b in zip(log, first)]
    apart = max((abs(a - b) for a, b in losses if None not in (a, b)), default=0.0)
    each = middle / gpus
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "H100"
    kind = GPUS[max((key for key in GPUS if key in name), key=len, default="H100")]
    plan = predict(recipe, kind, gpus, config=model_config(recipe))
    used = median(line["mfu"] or 0.0 for line in log[-len(speeds) :])
    return (
        f"| {gpus} | {recipe.train.batch_rows} | {middle:,.0f} ({low:,.0f} to {high:,.0f}) "
        f"| {used:.1%} | {each / (base or each):.1%} | {memory / GIB:.1f} "
        f"| {shares[0]:.1%}, {shares[1]:.1%} | {busy:.1%} | {apart:.1e} | {plan.tokens_per_s:,.0f} "
        f"({middle / plan.tokens_per_s:.2f}) | {plan.memory.tensors / GIB:.1f} |"
    ), each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--gpus", default="1", help="numbers of GPUs, such as 1,2,4,8")
    parser.add_argument(
        "--rows-per-gpu", type=int, help="rows of a step for each GPU: weak scaling"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    common = ["logging.every=1", "logging.tensorboard=false", "data.validation=0"]
    common += ["train.checkpoint_every=1000000"]
    if args.train:
        recipe = load_recipe(args.recipe, args.overrides)
        at = recipe.train.steps // 2 + 1
        train(recipe, args.out, make_trainer=partial(Profiled, at=at))
        return
    lines, first, base = [], list[dict[str, Any]](), None
    for gpus in map(int, args.gpus.split(",")):
        overrides = [*common, *args.overrides]
        if args.rows_per_gpu:
            overrides.append(f"train.batch_rows={gpus * args.rows_per_gpu}")
        out = args.out / f"{gpus}_gpus"
        launch(args, overrides, gpus, out)
        line, each = summary(load_recipe(args.recipe, overrides), gpus, out, first, base)
        first, base = first or steps(out), base or each
        lines.append(line)
    print(
        "| GPUs | rows a step | tokens/s (quartiles) | utilisation | efficiency | peak GiB "
        "| NCCL, alone | busy | loss apart | planned tokens/s (measured over it) | planned GiB |"
    )
    print("|" + "---|" * 11)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
