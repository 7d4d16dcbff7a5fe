"""What a study is: experiments in YAML, each a set of runs, each named by what it depends on."""

import json
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from osdn.errors import UserError
from osdn.evals.evaluation import Evaluation
from osdn.evals.mqar.recipe import Cell, MQARRecipe
from osdn.evals.tasks import make
from osdn.train.recipe import Recipe, Section, load_recipe, load_sections


class MQARExperiment(MQARRecipe):
    """A grid of MQAR trainings (the fields of `osdn mqar`) and what it is to answer."""

    question: str = ""


class Variant(Section):
    """One language model of an experiment.

    overrides: of the recipe, such as model.mixer=delta_net.
    start_from: the variant whose trained weights it starts from, of the same seed; null: none.
    fill: initial values in place of the model's own, such as initial_precond: 0; every parameter
        whose name ends so.
    """

    overrides: list[str] = Field(default=[])
    start_from: str | None = None
    fill: dict[str, float] = Field(default={})


class Measure(Section):
    """One evaluation of every model.

    task: its name on the command line of `osdn eval`.  options: the fields that it has.
    batch: items measured together; null: the task's own.
    """

    task: str
    options: dict[str, Any] = Field(default={})
    batch: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _known(self) -> "Measure":
        try:
            self.evaluation()
        except UserError as error:
            raise ValueError(str(error)) from error
        return self

    def evaluation(self) -> Evaluation:
        """What `evaluate` takes."""
        return make(self.task, self.options)


class LanguageExperiment(Section):
    """Language models that differ in their variants, and what is measured of each.

    recipe: a training recipe.  overrides: of it, for all.
    variants, seeds: the axes; train.seed is the seed's.
    first: variants that are run first, seed by seed; then each other variant with all its seeds, in
        their order, so that pairs are whole wherever the runs stop. null: all seed by seed.
    evaluations: what is measured of each, by name.
    measured: variants that are evaluated and reported; null: all. The others only lend weights.
    seconds: what one run takes, until one has been measured; the study's own assumption.
    question: what it is to answer.
    headlines: measures whose differences to the first variant are drawn, as the tables name them.
    """

    recipe: str
    overrides: list[str] = Field(default=[])
    variants: dict[str, Variant] = Field(min_length=1)
    seeds: list[int] = Field(default=[0, 1], min_length=1)
    first: list[str] | None = None
    evaluations: dict[str, Measure] = Field(default={})
    measured: list[str] | None = None
    seconds: float = Field(default=300, gt=0)
    question: str = ""
    headlines: list[str] = Field(default=[])

    @model_validator(mode="after")
    def _known(self) -> "LanguageExperiment":
        starts = (variant.start_from for variant in self.variants.values())
        for name in [*starts, *(self.measured or []), *(self.first or [])]:
            if name is not None and name not in self.variants:
                raise ValueError(f"no variant {name!r}; there are {', '.join(self.variants)}")
        for label in self.variants:
            self.chain(label)
        return self

    def chain(self, label: str) -> list[str]:
        """The variants whose weights lead to this one, itself last."""
        found: list[str] = []
        name: str | None = label
        while name is not None:
            if name in found:
                raise ValueError(f"variants.{label}: start_from leads back to {name}")
            found.insert(0, name)
            name = self.variants[name].start_from
        return found

    def labels(self) -> list[str]:
        """The variants that are measured."""
        return list(self.variants) if self.measured is None else self.measured

    def order(self) -> list[tuple[int, str]]:
        """(seed, variant) of every run, in the order of the runs."""
        labels = self.labels()
        first = [one for one in labels if self.first is None or one in self.first]
        rest = [one for one in labels if one not in first]
        return [
            *((seed, label) for seed in self.seeds for label in first),
            *((seed, label) for label in rest for seed in self.seeds),
        ]

    def phases(self, label: str, seed: int) -> list[Recipe]:
        """The trainings of one run, each from the weights of the one before it.

        A later one reads the documents in another order: its seed is moved by 1,000.
        """
        return [
            load_recipe(
                self.recipe,
                [*self.overrides, *self.variants[one].overrides, f"train.seed={seed + 1000 * i}"],
            )
            for i, one in enumerate(self.chain(label))
        ]


class Map(Section):
    """Heat maps over several MQAR experiments, a row each.

    rows: row label -> experiment.
    columns: "pairs": a map for every mixer, its columns the tasks in their order; "mixers": one
        map, its columns the mixers, of the first task.
    labels: of the columns; null: the pairs, or the mixers' names.
    """

    rows: dict[str, str] = Field(min_length=1)
    columns: Literal["pairs", "mixers"] = "pairs"
    labels: list[str | float] | None = None
    y: str = "head size"
    x: str = "pairs / head size"


class Study(Section):
    """Experiments in the order in which they are to be run.

    mqar, language: the experiments by name.
    maps: title -> Map.
    seconds_per_step: of an MQAR training, with all processes busy, until one has been measured.
    """

    mqar: dict[str, MQARExperiment] = Field(default={})
    language: dict[str, LanguageExperiment] = Field(default={})
    maps: dict[str, Map] = Field(default={})
    seconds_per_step: float = Field(default=0.025, gt=0)

    @model_validator(mode="after")
    def _rows_exist(self) -> "Study":
        for title, one in self.maps.items():
            for name in one.rows.values():
                if name not in self.mqar:
                    raise ValueError(f"maps.{title}: no experiment {name!r} under mqar")
        return self


class Run(NamedTuple):
    """One training and its measures.

    kind: "mqar" or "language".  experiment: the first that asks for it.
    spec: everything that its outcome depends on, as plain values.
    steps: optimiser steps at most.
    """

    kind: str
    experiment: str
    label: str
    seed: int
    spec: dict[str, Any]
    steps: int

    @property
    def name(self) -> str:
        """A hash of kind and spec: equal runs of two experiments are one."""
        return run_name(self.kind, self.spec)


def run_name(kind: str, spec: dict[str, Any]) -> str:
    """16 hexadecimal digits that the kind and the spec decide."""
    text = json.dumps([kind, spec], sort_keys=True)
    return blake2b(text.encode(), digest_size=8).hexdigest()


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """The study of a YAML file, with overrides.

    Raises:
        UserError: as osdn.train.recipe.load_sections.
    """
    return load_sections(Study, path, overrides)


def mqar_spec(recipe: MQARRecipe, cell: Cell) -> dict[str, Any]:
    """What a cell's outcome depends on; its label is not part of it."""
    spec = json.loads(json.dumps(recipe.describe(cell)))
    del spec["mixer"]["label"]
    return spec


def mqar_run(name: str, recipe: MQARRecipe, cell: Cell) -> Run:
    """A cell as a run."""
    options = recipe.train
    steps = -(-options.examples // cell.setting.batch_size) * options.epochs
    return Run("mqar", name, cell.mixer, cell.seed, mqar_spec(recipe, cell), steps)


def single(spec: dict[str, Any], device: str) -> tuple[MQARRecipe, Cell]:
    """The recipe with one cell that a spec describes."""
    fields = {
        "mixers": {"mixer": spec["mixer"]},
        "tasks": [spec["task"]],
        "widths": [spec["width"]],
        "learning_rates": [spec["learning_rate"]],
        "seeds": [spec["seed"]],
        "language": spec["language"],
        "model": spec["model"],
        "train": {**spec["train"], "device": device},
    }
    recipe = MQARRecipe.model_validate(fields)
    return recipe, recipe.cells()[0]


UNIMPORTANT = ("parallel", "logging")  # sections of a recipe that leave the outcome as it is


def language_runs(name: str, experiment: LanguageExperiment) -> list[Run]:
    """Every measured variant with every seed, in the experiment's order."""
    runs = []
    measures = {k: one.model_dump(mode="json") for k, one in experiment.evaluations.items()}
    for seed, label in experiment.order():
        phases = []
        chain = experiment.chain(label)
        for one, recipe in zip(chain, experiment.phases(label, seed), strict=True):
            resolved = recipe.resolved()
            phases.append({k: v for k, v in resolved.items() if k not in UNIMPORTANT})
            if fill := experiment.variants[one].fill:
                phases[-1]["fill"] = fill
        spec = {"phases": phases, "evaluations": measures}
        spec = json.loads(json.dumps(spec))
        steps = sum(phase["train"]["steps"] for phase in spec["phases"])
        runs.append(Run("language", name, label, seed, spec, steps))
    return runs


def all_runs(study: Study) -> list[Run]:
    """Every run once, in the order of the experiments."""
    found: dict[str, Run] = {}
    for name, experiment in study.mqar.items():
        for cell in experiment.cells():
            run = mqar_run(name, experiment, cell)
            found.setdefault(run.name, run)
    for name, language in study.language.items():
        for run in language_runs(name, language):
            found.setdefault(run.name, run)
    return list(found.values())
