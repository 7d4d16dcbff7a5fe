"""Tasks of the lm-evaluation-harness, in this project's form of results.

    osdn eval lm DIR --tasks lambada_openai,wikitext,piqa

The harness's own command line works on our checkpoints once osdn is imported, which
`python -m osdn.integrations.lm_eval run --model hf --model_args pretrained=DIR --tasks ...` does.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from osdn.errors import UserError
from osdn.evals.evaluation import Evaluation, option
from osdn.evals.models import LanguageModel
from osdn.evals.results import make_result, score
from osdn.evals.runner import SAMPLES, fingerprint
from osdn.system.files import replacing
from osdn.system.hub import hub_is_reachable

LN2 = math.log(2)  # nats in a bit


def _write_samples(path: Path, samples: dict[str, list[dict[str, Any]]]) -> None:
    # Whole or not at all, one line a sample, with the task in each.
    with replacing(path) as file:
        for task, records in samples.items():
            for record in records:
                line = {"task": task, **record}
                text = json.dumps(line, ensure_ascii=False, default=str) + "\n"
                file.write(text.encode())


def _result(
    model: LanguageModel, protocol: dict[str, Any], found: dict[str, Any]
) -> dict[str, Any]:
    scores = []
    for task, metrics in found["results"].items():
        records = found["samples"].get(task, [])
        for label, value in metrics.items():
            # The harness's names are "metric,filter"; its standard errors we replace by intervals.
            metric, _, filtered = label.partition(",")
            if isinstance(value, float) and filtered and not metric.endswith("_stderr"):
                # A task with several filters lists each sample once for each.
                kept = [r for r in records if r.get("filter", filtered) == filtered]
                values = [record[metric] for record in kept if metric in record]
                scores.append(_score(task, metric, value, values))
    return make_result(
        "lm",
        protocol=protocol,
        model=model.describe(),
        samples=sum(len(records) for records in found["samples"].values()),
        scores=scores,
    )


def _score(task: str, metric: str, value: float, values: list[Any]) -> dict[str, Any]:
    """The harness's figure, with an interval where its samples give the same figure.

    A group's figure, or a metric whose samples are not numbers, has none.
    """
    # Without samples that give it, the harness's number stands alone.
    plain = {"group": task, "name": metric, "value": value, "low": None, "high": None}
    plain["n"] = len(values)
    if not values:
        return plain
    try:
        # Its samples are (log-likelihood, words or bytes).
        if metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
            nats, weights = [-x for x, _ in values], [n for _, n in values]
            scale = (lambda x: x / LN2) if metric == "bits_per_byte" else math.exp
            own = score(metric, nats, weights, group=task, scale=scale)
        elif metric == "perplexity":
            own = score(metric, [-x for x in values], group=task, scale=math.exp)
        else:
            own = score(metric, [float(x) for x in values], group=task)
    except (TypeError, ValueError):
        return plain
    # An interval only where our mean is the harness's number: else it would be of another.
    return own if math.isclose(own["value"], value, rel_tol=1e-6, abs_tol=1e-9) else plain


@dataclass(frozen=True, kw_only=True)
class Harness(Evaluation):
    """Tasks of the lm-evaluation-harness; answers are kept as they come, for a killed run."""

    task: ClassVar[str] = "lm"
    about: ClassVar[str] = "tasks of the lm-evaluation-harness"
    batch: ClassVar[int] = 8

    tasks: str = option("names of the harness's, with commas")
    include_path: str | None = option("a directory of task files of your own", default=None)
    num_fewshot: int | None = option("examples in the prompt (default: the task's)", default=None)
    limit: int | None = option("samples of each task at most (default: all)", default=None, least=1)
    lengths: tuple[int, ...] | None = option(
        "tokens, for tasks that take lengths (niah_*)", default=None, least=1
    )

    def run(self, model: LanguageModel, out: Path, batch: int) -> dict[str, Any]:
        """Run the harness.

        Raises:
            UserError: no harness, an unknown task, no data for it.
        """
        tasks = [task for task in self.tasks.split(",") if task]
        try:
            # An extra, which takes seconds to import.
            import lm_eval
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise UserError(
                "lm: needs the lm-evaluation-harness: pip install 'osdn[eval]'"
            ) from error
        facts = {
            "pretrained": model.name,
            **({"max_seq_lengths": list(self.lengths)} if self.lengths else {}),
        }
        # Unknown names first, before the model is wrapped and data is loaded.
        manager = TaskManager(include_path=self.include_path, metadata=facts)
        unknown = [name for name in tasks if not manager.match_tasks([name])]
        if unknown:
            raise UserError(
                f"tasks: the harness has no {', '.join(unknown)}; lm-eval ls tasks names them all, "
                "and include_path adds your own"
            )
        out.mkdir(parents=True, exist_ok=True)
        harness_model = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=batch)
        try:
            found = lm_eval.simple_evaluate(
                model=harness_model,
                tasks=tasks,
                num_fewshot=self.num_fewshot,
                limit=self.limit,
                task_manager=manager,
                # The harness's cache, by our fingerprint: only the same model finds its answers.
                use_cache=str(out / f"answers_{fingerprint(model.model)}"),
                bootstrap_iters=0,  # intervals are ours
            )
        except Exception as error:  # whatever a task's data set or its script raises
            if hub_is_reachable():
                raise
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"tasks: cannot load the data of {self.tasks} ({reason}); there is no network"
            ) from error
        _write_samples(out / SAMPLES, found["samples"])
        protocol = {
            "protocol": "lm-evaluation-harness",
            # The version of each task is part of the protocol: their prompts change with it.
            "tasks": {name: found["versions"].get(name) for name in found["results"]},
            "fewshot": self.num_fewshot,
            "limit": self.limit,
            "lengths": self.lengths,
        }
        return _result(model, protocol, found)
