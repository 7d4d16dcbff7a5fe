"""`osdn eval TASK DIR...`: measure one or several models on a task."""

import argparse
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from osdn.cli import build_recall
from osdn.errors import UserError
from osdn.evals import lm, needle, perplexity, recall, residual_ratio
from osdn.evals.models import load_model
from osdn.evals.plots import save
from osdn.evals.results import RESULT, write_json
from osdn.evals.runner import fingerprint, measure

PLOT = "plot.png"
TASKS: dict[str, tuple[ModuleType, str]] = {
    "recall": (recall, "copy values out of real documents, given once and twice"),
    "needle": (needle, "find a number in 1k to 32k tokens of noise"),
    "perplexity": (perplexity, "by position, past the trained length, and by document"),
    "residual-ratio": (residual_ratio, "what a write leaves of the error, and shadow ablations"),
    "lm": (lm, "tasks of the lm-evaluation-harness"),
}
COUNTS = ("batch", "limit", "length", "lengths", "bucket", "window", "answer", "samples", "context")
BATCH = {"recall": 8, "needle": 4, "perplexity": 1, "residual-ratio": 1, "lm": 8}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A subcommand a task; all take the models, where to write, and how to run."""
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    for name, (module, text) in TASKS.items():
        task = tasks.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        task.add_argument(
            "models",
            nargs="+",
            metavar="DIR",
            help="checkpoint directories, or names on the Hugging Face hub",
        )
        module.add_arguments(task)
        task.add_argument(
            "--out",
            type=Path,
            help="where the results go, a directory a model (default: runs/eval/TASK); an "
            "evaluation that was stopped there goes on",
        )
        task.add_argument("--tokenizer", help="where a model has none: a directory or a name")
        task.add_argument("--batch", type=int, default=BATCH[name], help="prompts at a time")
        task.add_argument("--device", default="auto", help="auto, cpu or cuda")
        task.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    text = "build a recall set from this machine's Debian index or installed distributions"
    build = tasks.add_parser("build-recall", help=text, description=text[0].upper() + text[1:])
    build_recall.add_arguments(build)
    parser.epilog = "Protocols, files and examples: docs/evaluation.md"


def check_counts(args: argparse.Namespace) -> None:
    """Raise UserError if a number of the command is below 1 that must not be."""
    for name in COUNTS:
        given = getattr(args, name, None)
        for count in given if isinstance(given, list) else [given]:
            if count is not None and count < 1:
                raise UserError(f"--{name}: expected at least 1, got {count}")


def run(args: argparse.Namespace) -> None:
    """Measure every model in turn; print each result as it is there."""
    check_counts(args)
    if args.task == "build-recall":
        build_recall.run(args)
        return
    root = args.out or Path("runs/eval") / args.task
    for name in args.models:
        out = root / slug(name)
        result = evaluate(args, name, out)
        write_json(out / RESULT, result)
        if result["curves"] or result["maps"]:
            save(result["curves"], result["maps"], out / PLOT)
        print(f"{name}: {args.task}, {result['samples']} samples")
        for line in lines(result):
            print("  " + line)
        print(f"  {out / RESULT}")


def slug(name: str) -> str:
    """The directory name of a model's results."""
    return re.sub(r"[^\w.-]+", "_", name.strip("./")) or "model"


def evaluate(args: argparse.Namespace, name: str, out: Path) -> dict[str, Any]:
    """One model's result."""
    model = load_model(name, device=args.device, dtype=args.dtype, tokenizer=args.tokenizer)
    if args.task == "lm":
        tasks = [task for task in args.tasks.split(",") if task]
        options = {n: getattr(args, n) for n in ("include_path", "num_fewshot", "limit", "lengths")}
        return lm.evaluate(model, tasks, out, batch=args.batch, **options)
    if args.task == "recall" and args.protocol == "upstream":
        if args.data not in recall.UPSTREAM:
            raise UserError(
                f"--data: the upstream protocol knows {', '.join(recall.UPSTREAM)}, got {args.data}"
            )
        tasks = [recall.UPSTREAM[args.data]]
        return lm.evaluate(model, tasks, out, batch=args.batch, limit=args.limit)
    module: Any = TASKS[args.task][0]
    protocol, items = module.plan(args, model)
    records = measure(
        out,
        items,
        lambda some: module.answer(model, some, protocol),
        protocol=protocol | {"fingerprint": fingerprint(model.model, items)},
        batch=args.batch,
        name=args.task,
    )
    return module.conclude(model, protocol, records)


def lines(result: dict[str, Any]) -> list[str]:
    """The scores, one a line."""
    found = []
    for one in result["scores"]:
        label = " ".join(word for word in (one["group"], one["name"]) if word)
        interval = "" if one["low"] is None else f"  [{one['low']:.4g}, {one['high']:.4g}]"
        found.append(f"{label}: {one['value']:.4g}{interval}  n={one['n']}")
    return found
