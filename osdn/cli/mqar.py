"""`osdn mqar RECIPE`: compare mixers on multi-query associative recall."""

import argparse
from pathlib import Path

from osdn.cli import recipes
from osdn.evals.mqar.grid import PLOT, compare
from osdn.evals.mqar.recipe import MQARRecipe
from osdn.evals.results import RESULT, markdown
from osdn.train.recipe import load_sections

FIELDS = recipes.fields(MQARRecipe)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Recipe, overrides and the directory."""
    parser.add_argument("recipe", type=Path, help="such as recipes/mqar_small.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="change a field of the recipe, such as seeds=[0] or train.epochs=2",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="directory of the results (default: runs/ and the recipe's name); cells that are "
        "finished there are not trained again",
    )
    parser.epilog = "The fields of a recipe: docs/reference/evaluations.md"


def run(args: argparse.Namespace) -> None:
    """Train what is left of the grid, write result.json and the plot, print the table."""
    recipe = load_sections(MQARRecipe, recipes.find(args.recipe), args.overrides)
    out = args.out or Path("runs") / args.recipe.stem
    result = compare(recipe, out)
    print(markdown(result["tables"][0]))
    print(f"\n{out / RESULT} and {out / PLOT}; osdn report {out} makes a page of it")
