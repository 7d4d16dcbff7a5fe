"""A recipe's optimiser step beside flash-linear-attention's DeltaNet on the same rows.

    python benchmarks/train_gpu.py [--steps 6] recipes/340m.yaml [key=value ...]
    torchrun --nproc_per_node=2 benchmarks/train_gpu.py recipes/340m.yaml    # both under DDP

The same packed rows, passes, autocast, clipping and AdamW for both, by turns in one process (or
several): ours as `osdn train` makes it, FLA's model as its users train it, with its fused kernels.
Printed are the median step, model FLOPs utilisation (by each model's own count), peak memory.
"""

import argparse
import math
import time
from statistics import median

import torch
from fla.models import DeltaNetConfig, DeltaNetForCausalLM
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from osdn import OSDNConfig
from osdn.data import load_tokenizer
from osdn.model.flops import flops_per_token
from osdn.train import load_recipe
from osdn.train.distributed.parallel import Parallel
from osdn.train.distributed.sharding import Sharded
from osdn.train.log.speed import utilisation
from osdn.train.optim import fill_state, make_optimizer
from osdn.train.setup import make_config, make_device, make_rows, make_sharded, passes
from osdn.train.step import Stepper


class Peer(Sharded):
    """FLA's model, in one process or under DDP, where `Stepper` takes ours."""

    def __init__(self, config: OSDNConfig, parallel: Parallel, *, autocast: bool) -> None:
        self.parallel, self.ddp, self.kept = parallel, None, []
        fields = (
            "hidden_size",
            "num_hidden_layers",
            "num_heads",
            "intermediate_size",
            "vocab_size",
        )
        with parallel.device:
            model = DeltaNetForCausalLM(
                DeltaNetConfig(
                    **{name: getattr(config, name) for name in fields},
                    fuse_cross_entropy=False,
                    fuse_linear_cross_entropy=True,
                )
            )
        self.model, self.objective = model, _Mean(model, autocast)
        if parallel.size > 1:
            self.ddp = DistributedDataParallel(self.objective, gradient_as_bucket_view=True)


class _Mean(nn.Module):
    """The peer's mean loss over a pass, weighted as the recipe's objective weighs it."""

    def __init__(self, model: nn.Module, autocast: bool) -> None:
        super().__init__()
        self.model, self.autocast = model, autocast

    def forward(self, ids: Tensor, labels: Tensor, cu_seqlens: Tensor, count: float) -> Tensor:
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            loss = self.model(ids, labels=labels, cu_seqlens=cu_seqlens, use_cache=False).loss
        return loss * ((labels[:, 1:] >= 0).sum() / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--steps", type=int, default=6, help="of each model; the first is not counted"
    )
    args = parser.parse_intermixed_args()
    recipe = load_recipe(args.recipe, args.overrides)
    options, tokenizer = recipe.train, load_tokenizer(recipe.data.tokenizer)
    parallel = Parallel(recipe, make_device(options.device))
    if parallel.shard > 1:
        parser.error("parallel.shard: both models are compared under DDP; set it to 1")
    rows, *_ = make_rows(recipe, tokenizer, rank=parallel.rank, world=parallel.size)
    config = make_config(recipe, tokenizer)
    bfloat16 = options.precision == "bfloat16"
    models: dict[str, Sharded] = {
        config.mixers[0]: make_sharded(recipe, config, parallel),
        "FLA DeltaNet": Peer(config, parallel, autocast=bfloat16),
    }
    flops = [config, OSDNConfig(**{**config.to_dict(), "mixer": "delta_net", "forgetting": "none"})]
    steppers = {}
    for name, sharded in models.items():
        optimizer = make_optimizer(sharded.model, options.optimizer)
        fill_state(optimizer, 0)
        steppers[name] = Stepper(
            sharded,
            optimizer,
            parallel,
            options,
            passes=passes(recipe, parallel.size),
            beat=_silent,
        )
    seconds: dict[str, list[float]] = {name: [] for name in models}
    losses, peaks = dict.fromkeys(models, math.nan), dict.fromkeys(models, 0)
    for step in range(1, args.steps + 1):
        given = [next(rows) for _ in range(options.batch_rows // parallel.size)]
        for name, stepper in steppers.items():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = _others(models, name)
            parallel.total(0)  # all are here
            began = time.perf_counter()
            losses[name] = stepper(step, iter(given), measure=False).outcome().loss
            seconds[name].append(time.perf_counter() - began)
            peak = torch.cuda.max_memory_allocated() - before
            peaks[name] = max(peaks[name], parallel.largest(peak))
    rows.close()
    parallel.close()
    if not parallel.main:
        return
    tokens = options.batch_rows * options.seq_len
    print(
        f"{parallel.size} × {torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"{tokens:,} tokens a step"
    )
    for (name, times), counted in zip(seconds.items(), flops):
        speed = tokens / median(times[1:])
        used = utilisation(
            speed,
            flops_per_token(counted, options.seq_len),
            parallel.device,
            options.precision,
            parallel.size,
        )
        print(
            f"{name:14s} {median(times[1:]):7.3f} s  {speed:9,.0f} tokens/s  utilisation {used}  "
            f"{peaks[name] / 2**30:6.2f} GiB  loss {losses[name]:.3f}"
        )
    ratios = sorted(a / b for a, b in list(zip(*seconds.values()))[1:])
    print(
        f"ours over FLA, a step: median {median(ratios):.3f}, {ratios[0]:.3f} to {ratios[-1]:.3f}"
    )


def _others(models: dict[str, Sharded], name: str) -> int:
    """Bytes of the other model's weights and moments, which lie there too."""
    return sum(
        3 * 4 * p.numel()
        for key, other in models.items()
        if key != name
        for p in other.model.parameters()
    )


def _silent(step: int, stage: str) -> None:
    """Nobody watches for a stall here."""


if __name__ == "__main__":
    main()
