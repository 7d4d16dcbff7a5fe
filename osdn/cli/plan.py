"""`osdn plan RECIPE.yaml [key=value ...] --gpus N`: memory, time and cost before a run is begun."""

import argparse
from math import gcd
from pathlib import Path

from osdn.cli import recipes
from osdn.data.shards import JOB
from osdn.errors import UserError
from osdn.model.configuration import OSDNConfig
from osdn.plan.hardware import GIB, Gpu, assumptions, find_gpu
from osdn.plan.memory import count_model
from osdn.plan.predict import Plan, model_config, predict, smaller
from osdn.train.recipe import Recipe, load_recipe

FIELDS = tuple(recipes.fields(Recipe))  # for completion of key=value

MOST = 4096  # GPUs; past it the ring model of collectives says nothing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Recipe, overrides, and the GPUs."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="as for osdn train")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="as for osdn train"
    )
    parser.add_argument(
        "--gpus", default="1", help=f"how many, 1 to {MOST}; several (1,8,64) give a table"
    )
    parser.add_argument("--gpu", default="H100", help="which kind (default: H100)")
    parser.add_argument("--price", type=float, help="of one GPU for an hour, in any currency")
    parser.epilog = "It says what is measured and what is assumed; see docs/howto/plan-a-run.md"


def run(args: argparse.Namespace) -> None:
    """Predict and print."""
    recipe, gpu = load_recipe(recipes.find(args.recipe), args.overrides), find_gpu(args.gpu)
    if args.price is not None and not args.price >= 0:
        raise UserError(f"--price: expected at least 0, got {args.price}")
    # One count: part by part. Several: a line each, to be compared.
    counts = parse_counts(args.gpus)
    config = model_config(recipe)
    if len(counts) == 1:
        plan = predict(recipe, gpu, counts[0], config=config)
        print("\n".join(details(plan, args.price)))
        plans = [plan]
    else:
        plans = table(recipe, config, gpu, counts, args.price)
    # After the figures, so that they are the last thing read but for the assumptions.
    for line in warnings(plans, config):
        print(f"WARNING: {line}")
    # Always: a prediction without what it rests on is a guess.
    print("\nAssumptions:\n  " + "\n  ".join(assumptions()))


def parse_counts(text: str) -> list[int]:
    """ "1,8,64" as numbers."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or not all(1 <= count <= MOST for count in counts):
        raise UserError(f"--gpus: expected numbers from 1 to {MOST}, as in 8 or 1,8,64; got {text}")
    return counts


def details(plan: Plan, price: float | None) -> list[str]:
    """One plan, part by part."""
    train, memory, step = plan.recipe.train, plan.memory, plan.step
    # What the run will be, in the words of its documentation.
    form = "one process" if plan.gpus == 1 else "DDP" if plan.shard == 1 else "FSDP2"
    form = f"HSDP, {plan.shard} each" if 1 < plan.shard < plan.gpus else form
    parts = ", ".join(
        f"{name.replace('_', ' ')} {size(value)}" for name, value in memory._asdict().items()
    )
    times = ", ".join(f"{name} {duration(value)}" for name, value in step._asdict().items())
    fit = "fits in" if plan.fits else "DOES NOT FIT in"
    return [
        f"{plan.model.parameters:,} parameters on {plan.gpus:,} × {plan.gpu.name} ({form}); "
        f"{plan.passes} pass{'es' * (plan.passes > 1)} of {train.rows} × {train.seq_len:,} tokens "
        "a GPU and step",
        f"memory per GPU: {memory.total / GIB:.1f} GiB, {fit} {plan.gpu.memory / GIB:.1f} "
        f"({parts}; reserve and gaps on top)",
        f"speed: {plan.tokens_per_s:,.0f} tokens/s, {plan.tokens_per_s / plan.gpus:,.0f} a GPU, "
        f"utilisation {plan.utilisation:.1%} ({plan.flops / 1e9:.3g} GFLOP a token)",
        f"step: {duration(step.total)} ({times}); bottleneck: {step.bottleneck}",
        f"run: {train.steps:,} steps, {duration(plan.seconds)}, "
        f"{hours(plan.gpu_hours)} GPU hours{cost(plan, price)}",
    ]


def duration(seconds: float) -> str:
    """Seconds in the unit that fits: 85 µs, 3.4 ms, 12 s, 5.6 min, 7.8 h, 9.0 days."""
    # The largest unit of which there is at least one.
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs" if seconds else "0"


def hours(value: float) -> str:
    """A number of hours, with three digits where it is small."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def size(bytes_: float) -> str:
    """Bytes in the unit that fits: 5.2 MiB, 1.4 GiB."""
    return f"{bytes_ / GIB:.2f} GiB" if bytes_ >= GIB / 10 else f"{bytes_ / 2**20:.1f} MiB"


def cost(plan: Plan, price: float | None) -> str:
    """The price of a plan, where an hour's is known."""
    return "" if price is None else f", cost {plan.gpu_hours * price:,.0f} at {price:g} an hour"


def table(
    recipe: Recipe, config: OSDNConfig, gpu: Gpu, counts: list[int], price: float | None
) -> list[Plan]:
    """Print a line for each number of GPUs; returns the plans of those that are possible."""
    model, plans = count_model(config), []
    print(
        f"{model.parameters:,} parameters, {recipe.train.batch_rows * recipe.train.seq_len:,} "
        f"tokens a step, {recipe.train.steps:,} steps on {gpu.name}"
    )
    print(f"{'GPUs':>6} {'GiB':>7} {'tokens/s':>12} {'use':>6} {'time':>9} {'GPU hours':>10}  "
          "bottleneck")  # fmt: skip
    for count in counts:
        try:
            plan = predict(recipe, gpu, count, config=config, model=model)
        # One count that does not divide the rows must not hide the others.
        except UserError as error:
            print(f"{count:>6,} {error}")
            continue
        plans.append(plan)
        print(
            f"{count:>6,} {plan.memory.total / GIB:>7.1f} {plan.tokens_per_s:>12,.0f} "
            f"{plan.utilisation:>6.1%} {duration(plan.seconds):>9} {hours(plan.gpu_hours):>10}  "
            f"{plan.step.bottleneck}{cost(plan, price)}{'' if plan.fits else '; DOES NOT FIT'}"
        )
    return plans


def warnings(plans: list[Plan], config: OSDNConfig) -> list[str]:
    """What will not work, and what will be slow for a reason outside of the model."""
    lines = []
    for plan in plans:
        if plan.fits:
            continue
        # Only changes that leave the learning as it is.
        found = smaller(plan, config)
        if found is None:
            advice = "nothing that this recipe can change makes it fit; take more or larger GPUs"
        else:
            changes, other = found
            advice = (
                f"with {' '.join(changes)} it takes {other.memory.total / GIB:.1f} GiB at "
                f"{other.tokens_per_s:,.0f} tokens/s, and learns the same"
            )
        lines.append(f"{plan.gpus:,} GPUs: {plan.memory.total / GIB:.1f} GiB do not fit; {advice}")
    if plans:
        data, most = plans[-1].recipe.data, max(plan.gpus for plan in plans)
        # Shards are tokenized already; sharing a lane then costs a look at an index.
        tokens = isinstance(data.corpus, str) and (Path(data.corpus) / JOB).is_file()
        readers = most * max(1, data.workers)  # processes that tokenize
        sharing = readers // gcd(data.lanes, readers)  # how many read each lane (osdn/data/rows.py)
        if sharing > 1 and not tokens:
            lines.append(
                f"data.lanes={data.lanes} for {readers:,} processes that read: each text is "
                f"tokenised by {sharing:,} of them; tokenise it once (osdn tokenize)"
            )
    return lines
