"""`osdn demo`: what OSDN does, measured here and drawn on one page, from nothing.

Three parts: how d is learned while a sequence is read (no training), which pairs a full memory
recalls beside DeltaNet's (small models, several seeds), and a language model that writes.
"""

import argparse
from pathlib import Path

from osdn.cli import recipes
from osdn.cli.demo import adaptation, pictures, recall, text
from osdn.cli.hints import advise_numba
from osdn.errors import UserError
from osdn.train.recipe import Recipe

FIELDS = tuple(recipes.fields(Recipe))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Recipe, overrides, the directory and how many seeds."""
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="change the language model's recipe, such as train.steps=9",
    )
    parser.add_argument(
        "--recipe", type=Path, default=Path("tiny"), help="of the language model (default: tiny)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where all of it goes")
    parser.add_argument(
        "--seeds", type=int, default=8, help="recall models of each kind (default: 8)"
    )


def run(args: argparse.Namespace) -> None:
    """Measure the three parts, print each result, draw them."""
    if args.seeds < 1:
        raise UserError(f"--seeds: expected at least 1, got {args.seeds}")
    recipe = text.read_recipe(recipes.find(args.recipe), args.overrides)
    print(
        f"Three parts: the rule by itself, {2 * args.seeds} small recall models, a language model. "
        "About eight minutes\non two idle CPU cores. What is interrupted is resumed by the same "
        f"command. The end is {args.out / 'demo.png'}\n",
        flush=True,
    )
    advise_numba()
    print("1. A step size for each key feature, learned while a sequence is read", flush=True)
    adapted = adaptation.read_sequences()
    print(pictures.tell_adaptation(adapted), flush=True)
    print(f"\n2. Recall of {recall.PAIRS} pairs from a 16 × 16 memory", flush=True)
    recalled = recall.measure(args.out / "recall", args.seeds)
    print(pictures.tell_recall(recalled), flush=True)
    print("\n3. A language model of Python's help pages, from nothing", flush=True)
    written = text.write(recipe, args.out)
    print(f"{pictures.tell_text(written)}:\n\n{written.passage}", flush=True)
    path = args.out / "demo.png"
    pictures.draw(adapted, recalled, written, path)
    print(f"\n{path} shows all three.")
