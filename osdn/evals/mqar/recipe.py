"""The recipe of an MQAR comparison: which mixers, tasks, widths, learning rates and seeds."""

import re
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, field_validator, model_validator

from osdn.evals.mqar.task import MQARModel, Task, check_task
from osdn.model.configuration import MIXERS
from osdn.train.recipe import Optimizer, Schedule, Section, drop_later_fields


class Setting(Section):
    """One task and the batch it is trained with.

    length: tokens in a sequence.  pairs: key-value pairs in it.
    batch_size: sequences in an optimiser step.
    """

    length: int
    pairs: int
    batch_size: int = Field(ge=1)


class Language(Section):
    """What all the tasks share; see osdn.evals.mqar.task.Task."""

    vocab_size: int = 8192  # zoology's, as is power
    power: float = 0.01
    random_filler: bool = False


class Model(Section):
    """What all the models share.

    layers: "mixer" (the one that is compared) or "convolution" (a short one, in every model).
    init_std: of the initial weights of linear layers and embedding.
    """

    layers: list[Literal["mixer", "convolution"]] = Field(default=["mixer", "mixer"], min_length=1)
    init_std: float = Field(default=0.02, gt=0)


class Training(Section):
    """How every model is trained; the learning rate comes from the grid.

    examples, test_examples: sequences in the two sets.
    epochs: passes over the training set, at most.
    stop_at: share of right answers in the test set at which training ends before that.
    precision: "float32", or "bfloat16" in compute, under autocast; weights are float32.
    optimizer, schedule: as in a training recipe, but for the learning rate; AdamW only.
    device: "auto" (CUDA where there is one), or a PyTorch device name.
    processes: cells trained at a time, each with one thread where there are several.
    """

    examples: int = Field(default=100_000, ge=1)
    test_examples: int = Field(default=3000, ge=1)
    epochs: int = Field(default=64, ge=1)
    stop_at: float = Field(default=0.99, gt=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    optimizer: Optimizer = Optimizer(beta2=0.999)  # PyTorch's beta2; zoology's schedule
    schedule: Schedule = Schedule(warmup_steps=0, min_ratio=0.0)
    device: str = "auto"
    processes: int = Field(default=1, ge=1)

    @field_validator("optimizer")
    @classmethod
    def _adamw(cls, value: Optimizer) -> Optimizer:
        if value.name != "adamw":
            raise ValueError(f"name: expected adamw in MQAR, got {value.name!r}")
        return value


class Cell(NamedTuple):
    """One training of the grid."""

    mixer: str
    setting: Setting
    width: int
    learning_rate: float
    seed: int

    @property
    def file(self) -> str:
        """The name of the file that keeps the cell's outcome."""
        # A label is free text, and becomes part of a file's name.
        label = re.sub(r"[^\w.-]+", "_", self.mixer)
        return (
            f"{label}-T{self.setting.length}-P{self.setting.pairs}-D{self.width}"
            f"-lr{self.learning_rate:g}-seed{self.seed}.json"
        )


class MQARRecipe(Section):
    """A grid of trainings.

    mixers: label -> {mixer: osdn | delta_net | gated_delta_net | attention, and options of that
        layer}.
    tasks, widths, learning_rates, seeds: the other axes; every mixer gets all of them.
    language, model, train: what the cells share.
    """

    mixers: dict[str, dict[str, Any]] = Field(min_length=1)
    tasks: list[Setting] = Field(min_length=1)
    widths: list[int] = Field(min_length=1)
    learning_rates: list[float] = Field(min_length=1)
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    language: Language = Language()
    model: Model = Model()
    train: Training = Training()

    @field_validator("mixers")
    @classmethod
    def _kinds(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for label, options in value.items():
            if options.get("mixer") not in MIXERS:
                raise ValueError(
                    f"{label}: expected mixer: one of {', '.join(MIXERS)}, "
                    f"got {options.get('mixer')!r}"
                )
        return value

    @field_validator("learning_rates")
    @classmethod
    def _positive(cls, value: list[float]) -> list[float]:
        if min(value) <= 0:
            raise ValueError(f"expected learning rates > 0, got {min(value)}")
        return value

    @model_validator(mode="after")
    def _buildable(self) -> "MQARRecipe":
        for setting in self.tasks:
            # All is built once on the meta device: a wrong cell is told before any is trained.
            check_task(self.task(setting))
        for label, width in product(self.mixers, self.widths):
            try:
                with torch.device("meta"):
                    self.build(label, width)
            except (TypeError, ValueError) as error:
                raise ValueError(f"mixers.{label}, width {width}: {error}") from error
        # Two equal names would be one file, and one outcome for two cells.
        names = [cell.file for cell in self.cells()]
        if len(set(names)) < len(names):
            raise ValueError("two cells of the grid are the same; name each value once")
        return self

    def task(self, setting: Setting) -> Task:
        """The task of a setting."""
        return Task(setting.length, setting.pairs, **self.language.model_dump())

    def build(self, label: str, width: int) -> MQARModel:
        """A new model with the mixer of that label."""
        options = dict(self.mixers[label])
        return MQARModel(
            vocab_size=self.language.vocab_size,
            width=width,
            layers=self.model.layers,
            mixer=options.pop("mixer"),
            options=options,
            init_std=self.model.init_std,
            autocast=self.train.precision == "bfloat16",
        )

    def cells(self) -> list[Cell]:
        """All trainings, seed by seed, so that an unfinished grid has whole seeds."""
        axes = (self.seeds, self.tasks, self.widths, self.mixers, self.learning_rates)
        return [Cell(m, t, w, lr, seed) for seed, t, w, m, lr in product(*axes)]

    def describe(self, cell: Cell) -> dict[str, Any]:
        """Everything that a cell's outcome depends on, as plain values."""
        shared = self.model_dump(mode="json", include={"language", "model", "train"})
        for name in ("device", "processes"):  # they do not change an outcome
            shared["train"].pop(name)
        if self.train.precision == "float32":  # records from before this field name none
            del shared["train"]["precision"]
        drop_later_fields(shared)
        own = {"label": cell.mixer, **self.mixers[cell.mixer]}
        axes = {"width": cell.width, "learning_rate": cell.learning_rate, "seed": cell.seed}
        return {"mixer": own, "task": cell.setting.model_dump(), **axes, **shared}
