"""All evaluations, and how one is run: what a Python program needs of this package.

from osdn.evals.tasks import Perplexity, Recall, evaluate

result = evaluate("runs/model", Perplexity(data="held_out.jsonl"), "runs/perplexity")
print(result["scores"])
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from osdn.errors import UserError
from osdn.evals.evaluation import Evaluation
from osdn.evals.lm import Harness
from osdn.evals.models import LanguageModel, load_model
from osdn.evals.needle import Needle
from osdn.evals.perplexity import Perplexity
from osdn.evals.plots import save
from osdn.evals.recall import Recall
from osdn.evals.repeats import Repeats
from osdn.evals.residual_ratio import ResidualRatio
from osdn.evals.results import RESULT, write_json

__all__ = [
    "Evaluation",
    "Harness",
    "LanguageModel",
    "Needle",
    "Perplexity",
    "Recall",
    "Repeats",
    "ResidualRatio",
    "evaluate",
    "load_model",
    "make",
]

PLOT = "plot.png"
TASKS: dict[str, type[Evaluation]] = {
    one.task: one for one in (Recall, Repeats, Needle, Perplexity, ResidualRatio, Harness)
}


def make(task: str, options: Mapping[str, Any]) -> Evaluation:
    """The evaluation of that task with these fields, as a YAML file gives them.

    Raises:
        UserError: no such task or field, or a value of the wrong kind.
    """
    if task not in TASKS:
        raise UserError(f"expected one of the tasks {', '.join(TASKS)}, got {task!r}")
    kind = TASKS[task]
    known = [one.name for one in fields(kind)]
    for name in options:
        if name not in known:
            raise UserError(f"{task}: no option {name!r}; there are {', '.join(known)}")
    try:
        # pydantic checks a YAML file's values against the dataclass's own annotations.
        return TypeAdapter(kind).validate_python(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{task}.{where}: {first['msg']}, got {first['input']!r}") from error


def evaluate(
    model: LanguageModel | str,
    evaluation: Evaluation,
    out: str | Path,
    *,
    batch: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    tokenizer: str | None = None,
) -> dict[str, Any]:
    """Measure a model; write out/result.json, out/plot.png and out/samples.jsonl.

    An evaluation that was stopped continues in the same directory.

    Args:
        model: as load_model gives it; or a checkpoint directory or a name on the hub, which is
            loaded with device, dtype and tokenizer.
        evaluation: such as Recall(data="test.jsonl").
        batch: items measured together; None: the evaluation's own.

    Returns:
        The result (osdn.evals.results).

    Raises:
        UserError: see load_model and the evaluation.
    """
    if batch is not None and batch < 1:
        raise UserError(f"batch: expected at least 1, got {batch}")
    if isinstance(model, str):
        model = load_model(model, device=device, dtype=dtype, tokenizer=tokenizer)
    out = Path(out)
    result = evaluation.run(model, out, batch or evaluation.batch)
    # The figures first: a plot that fails must not cost them.
    write_json(out / RESULT, result)
    if result["curves"] or result["maps"]:
        save(result["curves"], result["maps"], out / PLOT)
    return result
