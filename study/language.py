"""One language-model run: a chain of trainings, each from the weights before it, then evaluations.

A training's directory is named by the hash of all that leads to it, so that two runs with the same
beginning train it once where they share a disk (the second waits), and a run that was killed goes
on from its newest checkpoint, or with the evaluations that it has not made.
"""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM

import osdn.model.modeling  # noqa: F401  registers the model class
from osdn.data import load_tokenizer
from osdn.data.shards import tokenizer_fingerprint
from osdn.errors import UserError
from osdn.evals.results import RESULT, read_result
from osdn.evals.tasks import evaluate
from osdn.system.locks import DirectoryLock
from osdn.train.checkpoint import reading as checkpoint
from osdn.train.distributed.parallel import Parallel
from osdn.train.loop import train
from osdn.train.recipe import Data, Recipe
from osdn.train.setup import open_data
from osdn.train.trainer import Trainer
from study.plan import Measure, Run, run_name
from study.records import Record

ONLY_OSDN = ("attn.initial_precond", "attn.gamma_proj.weight", "attn.gamma_proj.bias")


class StartedTrainer(Trainer):
    """A training that starts from another model's weights, or from other initial values.

    Parameters that the other model lacks keep their initial values, which leave its function as it
    is (d_1 = 1; γ ≈ 0.999 with forgetting). Optimizer and schedule start afresh.

    Args:
        start: the other model's directory; None: none.
        fill: see study.plan.Variant.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        found: checkpoint.Checkpoint | None,
        parallel: Parallel,
        lock: DirectoryLock,
        *,
        start: Path | None,
        fill: dict[str, float],
    ) -> None:
        super().__init__(recipe, out, found, parallel, lock)
        if found is None and start is not None:
            load_weights(self.sharded.model, start)
        if found is None:
            fill_parameters(self.sharded.model, fill)


def load_weights(model: torch.nn.Module, start: Path) -> None:
    """Give a model the weights of the checkpoint directory `start`.

    Raises:
        UserError: the two differ in more than the preconditioner's own parameters.
    """
    weights = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).state_dict()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    wrong = [*(name for name in missing if not name.endswith(ONLY_OSDN)), *unexpected]
    if wrong:
        raise UserError(f"start_from: {start} does not fit this model: {', '.join(wrong[:3])}")


@torch.no_grad()
def fill_parameters(model: torch.nn.Module, fill: dict[str, float]) -> None:
    """Set every parameter whose name ends with a key of `fill` to its value.

    Raises:
        UserError: a key that ends no parameter's name.
    """
    for end, value in fill.items():
        named = [p for name, p in model.named_parameters() if f".{name}".endswith(f".{end}")]
        if not named:
            raise UserError(f"fill: this model has no parameter whose name ends with {end!r}")
        for parameter in named:
            parameter.fill_(value)


def make_recipe(phase: dict[str, Any], device: str) -> Recipe:
    """The recipe of a resolved phase; what the tokenizer and the rows decide is left out."""
    model = {name: value for name, value in phase["model"].items() if value is not None}
    quiet = {"tensorboard": False, "progress": False}
    train_section = {**phase["train"], "device": device}
    fields = {"model": model, "data": phase["data"], "train": train_section, "logging": quiet}
    return Recipe.model_validate(fields)


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Wait until no other process of this machine trains there; the lock ends with its process."""
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(str(directory / ".lock")):
        yield


def directory_of(spec: dict[str, Any], number: int, work: Path) -> Path:
    """Where phase `number` of a run is trained; runs that begin alike share it."""
    return work / run_name("training", spec["phases"][: number + 1])


def steps_left(spec: dict[str, Any], work: Path) -> int:
    """Steps of the phases that are still to be trained in `work`, after the newest checkpoints."""
    left = 0
    for i, phase in enumerate(spec["phases"]):
        directory = directory_of(spec, i, work)
        if not (directory / "model").exists():
            left += phase["train"]["steps"] - checkpoint.newest_step(directory / "checkpoints")
    return left


def data_digest(spec: dict[str, Any]) -> str:
    """16 hexadecimal digits of what its trainings read: corpora, held-out texts, tokenizers."""
    found = []
    for phase in spec["phases"]:
        data = Data.model_validate(phase["data"])
        texts = [corpus.fingerprint for corpus in open_data(data)]
        found.append([*texts, tokenizer_fingerprint(load_tokenizer(data.tokenizer))])
    return blake2b(json.dumps(found).encode(), digest_size=8).hexdigest()


def check_data(todo: Iterable[Run], records: Iterable[Record]) -> None:
    """That what is to be trained reads what the records of the same corpus names have read.

    Raises:
        UserError: the files have changed since, so that equal seeds are no pairs.
    """
    made: dict[str, set[str]] = {}  # what specs name -> the digests of what was there
    for record in records:
        if record["kind"] == "language" and (digest := record["outcome"].get("data")):
            made.setdefault(_named(record["spec"]), set()).add(digest)
    for run in {_named(one.spec): one for one in todo if one.kind == "language"}.values():
        then = made.get(_named(run.spec))
        if then is not None and then != {now := data_digest(run.spec)}:
            raise UserError(
                f"{run.experiment}: records are of another corpus or tokenizer (data "
                f"{', '.join(sorted(then - {now}))}) "
                f"than {run.spec['phases'][0]['data']['corpus']} is now (data {now}), so that "
                "equal seeds would be no pairs; give a new --out and no --merge, or the old files"
            )


def _named(spec: dict[str, Any]) -> str:
    return json.dumps([phase["data"] for phase in spec["phases"]], sort_keys=True)


def _note_data(directory: Path, digest: str) -> None:
    """Write down what a training reads, or see that it is what it read: its weights stay there."""
    path = directory / "data"
    if not path.exists():
        path.write_text(digest)
    elif (before := path.read_text()) != digest:
        raise UserError(
            f"{directory}: trained on another corpus or tokenizer (data {before}, now {digest}); "
            "delete it, or give another --work"
        )


def perform(spec: dict[str, Any], *, device: str, work: Path) -> dict[str, Any]:
    """Train the phases and measure the last model.

    Returns:
        {"train": loss, bits per byte and speed of the last phase, "evaluations": {name: result
        without its provenance}, "data": data_digest, "steps": of all phases, "trained": of those
        that were not trained before, "evaluated": the evaluations that were not made before,
        "seconds": {"train", "evaluations"}}.
    """
    start: Path | None = None
    began, phases, data = time.monotonic(), spec["phases"], data_digest(spec)
    trained_steps = steps_left(spec, work)
    for i, phase in enumerate(phases):
        directory = directory_of(spec, i, work)
        recipe = make_recipe(phase, device)
        # A worker trains many models, and PyTorch compiles one function for eight of them at most.
        torch._dynamo.reset()
        make_trainer = partial(StartedTrainer, start=start, fill=phase.get("fill", {}))
        with alone(directory):
            _note_data(directory, data_digest({"phases": phases[: i + 1]}))
            result = train(recipe, directory, make_trainer=make_trainer)
        start = directory / "model"
    assert start is not None
    trained, results = time.monotonic(), work / "eval" / run_name("language", spec)
    left = [  # all of a model that was trained just now
        name
        for name in spec["evaluations"]
        if trained_steps or not (results / name / RESULT).exists()
    ]
    for name in left:
        measure = Measure.model_validate(spec["evaluations"][name])
        where, batch = results / name, measure.batch
        evaluate(str(start), measure.evaluation(), where, batch=batch, device=device)
    found = {name: read_result(results / name) for name in spec["evaluations"]}
    for one in found.values():
        del one["provenance"]
    last = [loss for _, loss in result.loss[-50:] if loss is not None]
    return {
        "train": {
            "loss": sum(last) / len(last) if last else None,
            "bits_per_byte": result.bits_per_byte,
            "validation": result.validation,
            "parameters": result.parameters,
            "tokens_per_s": result.tokens_per_s,
            "nonfinite": result.nonfinite,
        },
        "evaluations": found,
        "data": data,
        "steps": sum(phase["train"]["steps"] for phase in phases),
        "trained": trained_steps,
        "evaluated": left,
        "seconds": {
            "train": trained - began,
            "evaluations": time.monotonic() - trained,
        },
    }
