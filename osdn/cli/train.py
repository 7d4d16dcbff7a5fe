"""`osdn train RECIPE.yaml [key=value ...]`: train a model as a recipe says.

Over several processes: torchrun --nproc_per_node=N -m osdn train RECIPE.yaml
"""

import argparse
from pathlib import Path

from osdn.cli import recipes
from osdn.cli.hints import advise_numba
from osdn.train.distributed.parallel import environment_rank
from osdn.train.log.run_log import TrainResult
from osdn.train.loop import train
from osdn.train.recipe import Recipe, load_recipe

FIELDS = recipes.fields(Recipe)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Recipe, overrides and the run's directory."""
    parser.add_argument(
        "recipe",
        type=Path,
        metavar="RECIPE",
        help=f"a .yaml file, or one that comes with osdn: {recipes.known()}",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="change a field of the recipe, such as model.mixer=delta_net or train.steps=100",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="the run's directory (default: runs/ and the recipe's name); a run that was stopped "
        "there is resumed",
    )
    parser.epilog = "Recipe fields and the files of a run: docs/howto/train-on-your-data.md"


def run(args: argparse.Namespace) -> None:
    """Train and print what came of it."""
    recipe = load_recipe(recipes.find(args.recipe), args.overrides)
    advise_numba()
    result = train(recipe, args.out or Path("runs") / args.recipe.stem)
    if environment_rank() == 0:
        print(summary(result))


def summary(result: TrainResult) -> str:
    """The result in one line."""
    bits = result.bits_per_byte
    measured = "" if bits is None else f"{bits:.4f} bits per byte of held-out text, "
    return (
        f"{result.steps:,} steps, {result.parameters:,} parameters: {measured}"
        f"{result.tokens_per_s:,.0f} tokens/s, {result.nonfinite} steps not finite; "
        f"the model is in {result.out / 'model'}"
    )
