"""`osdn eval TASK DIR...`: measure one or several models on a task."""

import argparse
import re
from pathlib import Path
from typing import Any

from osdn.evals.evaluation import add_options, from_options
from osdn.evals.results import RESULT
from osdn.evals.tasks import TASKS, evaluate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A subcommand a task; all take the models, where to write, and how to run."""
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    for name, kind in TASKS.items():
        text = kind.about
        task = tasks.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        task.add_argument(
            "models",
            nargs="+",
            metavar="DIR",
            help="checkpoint directories, or names on the Hugging Face hub",
        )
        add_options(task, kind)
        task.add_argument(
            "--out",
            type=Path,
            help="where the results go, a directory a model (default: runs/eval/TASK); an "
            "evaluation that was stopped there continues",
        )
        task.add_argument("--tokenizer", help="where a model has none: a directory or a name")
        task.add_argument(
            "--batch", type=int, help=f"items measured together (default: {kind.batch})"
        )
        task.add_argument("--device", default="auto", help="auto, cpu or cuda")
        task.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.epilog = "Protocols, files and examples: docs/reference/evaluations.md"


def run(args: argparse.Namespace) -> None:
    """Measure every model in turn; print each result as it is there."""
    evaluation = from_options(TASKS[args.task], args)
    root = args.out or Path("runs/eval") / args.task
    options = {name: getattr(args, name) for name in ("batch", "device", "dtype", "tokenizer")}
    for name in args.models:
        out = root / slug(name)
        result = evaluate(name, evaluation, out, **options)
        print(f"{name}: {args.task}, {result['samples']} samples")
        for line in lines(result):
            print("  " + line)
        print(f"  {out / RESULT}")


def slug(name: str) -> str:
    """The directory name of a model's results."""
    return re.sub(r"[^\w.-]+", "_", name.strip("./")) or "model"


def lines(result: dict[str, Any]) -> list[str]:
    """The scores, one a line."""
    found = []
    for one in result["scores"]:
        label = " ".join(word for word in (one["group"], one["name"]) if word)
        interval = "" if one["low"] is None else f"  [{one['low']:.4g}, {one['high']:.4g}]"
        found.append(f"{label}: {one['value']:.4g}{interval}  n={one['n']}")
    return found
