"""What a record of a study holds, as far as reports and predictions of time read it.

Records are merged from other machines and from packed files, so they are compared with these
schemas before anything is computed from them (osdn.system.outside). Fields not named here are kept.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from osdn.system.outside import Measure, Outside


class Task(Outside):
    """Of an MQAR run: what the clock needs of it."""

    length: PositiveInt
    batch_size: PositiveInt


class MQARSpec(Outside):
    """What an MQAR run's outcome depends on."""

    mixer: dict[str, Any]
    task: Task
    width: int


class MQAROutcome(Outside):
    """What an MQAR run was measured at."""

    accuracy: Measure
    diverged: bool
    state_size: int
    steps: NonNegativeInt


class Training(Outside):
    """Of a phase: what the clock needs of it."""

    seq_len: PositiveInt
    batch_rows: PositiveInt


class Phase(Outside):
    """One training of a language model."""

    data: dict[str, Any]
    train: Training


class LanguageSpec(Outside):
    """What a language model's outcome depends on."""

    phases: list[Phase] = Field(min_length=1)
    evaluations: dict[str, dict[str, Any]]


class Trained(Outside):
    """The end of a training."""

    loss: Measure | None
    bits_per_byte: Measure | None
    nonfinite: NonNegativeInt


class Score(Outside):
    """One score of an evaluation."""

    group: str
    name: str
    value: Measure


class Curve(Outside):
    """Points [x, y, ...] of a line each."""

    title: str
    series: dict[str, list[Annotated[list[Measure], Field(min_length=2)]]]


class Evaluated(Outside):
    """One evaluation's result."""

    scores: list[Score]
    curves: list[Curve]


class Seconds(Outside):
    """How long the parts took."""

    train: float
    evaluations: float


class LanguageOutcome(Outside):
    """What a language model was measured at."""

    train: Trained
    evaluations: dict[str, Evaluated]
    seconds: Seconds
    trained: NonNegativeInt
    data: str | None = None
    evaluated: list[str] = Field(default_factory=list)


class _Record(Outside):
    """A record; its name is the hash of kind and spec."""

    name: str
    seconds: float
    machine: str
    processes: int


class MQARRecord(_Record):
    """Of an MQAR run."""

    kind: Literal["mqar"]
    spec: MQARSpec
    outcome: MQAROutcome


class LanguageRecord(_Record):
    """Of a language model."""

    kind: Literal["language"]
    spec: LanguageSpec
    outcome: LanguageOutcome


AnyRecord = Annotated[MQARRecord | LanguageRecord, Field(discriminator="kind")]
