"""The recipe: what a training run is, as typed sections read from YAML and overrides."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
)

from osdn.errors import UserError
from osdn.model.configuration import OSDNConfig
from osdn.system.outside import shown
from osdn.train.plain_yaml import plain_yaml

# The model's section is OSDNConfig itself: its fields are said once, there.
MODEL_FIELDS = [
    name for name, kind in OSDNConfig.__annotations__.items() if "ClassVar" not in str(kind)
]


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values do not change, numbers are numbers."""

    # A misspelt key must be an error: a run with a default in its place looks right.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_guess(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what pydantic would turn into a number: true, and a number in quotes."""
        # pydantic takes true for 1 and "3" for 3; in a recipe both are mistakes.
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError(f"expected a number, got {str(value).lower()}")
        if isinstance(value, str) and kinds and kinds <= {int, float, bool, type(None)}:
            raise ValueError(f"expected {_words(kinds)}, got the text {value[:60]!r}")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The classes that a field's annotation allows."""
    if get_origin(annotation) in (Union, UnionType, Annotated):  # of a union, every member
        arguments = get_args(annotation)
        inner = arguments[:1] if get_origin(annotation) is Annotated else arguments
        return set().union(*map(_kinds, inner))
    return {annotation}


def _words(kinds: set[Any]) -> str:
    return "true or false" if bool in kinds else "a number"


# Fields that came after the first checkpoints and records, with what all runs did before. A
# resolved recipe names them only where they have another value, so that those keep their identity.
LATER_FIELDS = {
    "model.state_decay": "none",
    "train.optimizer.name": "adamw",
    "train.optimizer.momentum": 0.95,  # read by Muon only
}


def drop_later_fields(resolved: dict[str, Any]) -> None:
    """Delete each of LATER_FIELDS where it has the value of all runs from before the field."""
    for key, before in LATER_FIELDS.items():
        *sections, name = key.split(".")
        fields = resolved
        for section in sections:
            fields = fields.get(section, {})
        if name in fields and fields[name] == before:
            del fields[name]


S = TypeVar("S", bound=Section)


class Data(Section):
    """Which text, and how it is cut into tokens.

    corpus: "stdlib" (the Python standard library's own source), "hf:NAME" (a Hugging Face
        dataset, streamed), a directory that `osdn tokenize` made, Megatron's .bin and .idx files,
        or one or several paths, URLs (s3://, hf://), globs or directories of text, .jsonl and
        .parquet files, of which the first two may end in .gz or .zst; or a mapping of such names
        to weights, each corpus's share of the training tokens.
    text_field: the column of .jsonl, .parquet and hub records that holds the text.
    separator: in text files, the string between documents; null: each file is a document.
    subset, split: of a hub dataset.
    tokenizer: "byte", a directory, or a Hugging Face name.
    validation: the share of documents held out, chosen by a hash of their content, in [0, 1);
        0 for no validation; or a corpus of its own, named as in `corpus`.
    validation_bytes: UTF-8 bytes of held-out text that a validation reads.
    shuffle_bytes: UTF-8 bytes of training documents that are shuffled together in memory.
    lanes: streams that the training documents are dealt to, part of the order of rows; where they
        are a multiple of processes × workers each reads its own (osdn/data/rows.py).
    workers: processes that read and tokenize ahead, for each process of the run; 0 for none. They
        change nothing but the speed.
    """

    corpus: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[dict[str, Annotated[float, Field(gt=0, strict=True)]], Field(min_length=1)]
    ) = "stdlib"
    text_field: str = "text"
    separator: str | None = Field(default=None, min_length=1)
    subset: str | None = None
    split: str = "train"
    tokenizer: str = "byte"
    validation: float | str = 0.05
    validation_bytes: int = Field(default=200_000, ge=4)  # 4: the longest character in UTF-8
    shuffle_bytes: int = Field(default=2**24, ge=1)
    lanes: int = Field(default=1, ge=1)
    workers: int = Field(default=0, ge=0)

    @field_validator("validation")
    @classmethod
    def _share(cls, value: float | str) -> float | str:
        if not isinstance(value, str) and not 0 <= value < 1:
            raise ValueError(f"expected a share in [0, 1) or the name of a corpus, got {value}")
        return value


class Optimizer(Section):
    """AdamW, or Muon with AdamW. Decay falls only on the matrices of linear and convolution layers.

    name: "adamw", or "muon" for the matrices of the blocks with AdamW for all else; Muon's updates
        are scaled so that AdamW's learning rate and decay fit it.
    lr: learning rate at the end of the warm-up, per step.
    beta1, beta2: AdamW's decay per step of the mean gradient and mean squared gradient.
    momentum: Muon's decay per step of the mean gradient.
    eps: added to the root of the mean squared gradient.
    weight_decay: per step, times the learning rate.
    clip: largest norm of the whole gradient; null: unlimited.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    momentum: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip: float | None = Field(default=1.0, gt=0)

    @model_serializer(mode="wrap")
    def _as_before_muon(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """AdamW without Muon's fields: so checkpoints and records of before stay the same."""
        plain: dict[str, Any] = fields(self)
        if self.name == "adamw":
            for later in ("name", "momentum"):
                plain.pop(later, None)
        return plain


class Schedule(Section):
    """The learning rate over the steps: linear warm-up, then a cosine down to min_ratio · lr.

    warmup_steps: optimizer steps up to the full learning rate.
    min_ratio: the last step's learning rate as a share of the full one, in [0, 1].
    """

    warmup_steps: int = Field(default=100, ge=0)
    min_ratio: float = Field(default=0.1, ge=0, le=1)


class Train(Section):
    """The run.

    steps: optimizer steps.
    seq_len: tokens in a row.
    rows: rows in a forward pass of one process.
    batch_rows: rows in a step, over all processes; a step sees seq_len · batch_rows tokens, in
        batch_rows / (rows · processes) forward passes of each process.
    seed: of the initial weights and of the order of the documents.
    precision: "float32", or "bfloat16" in compute (weights, optimizer and the reduction of
        gradients stay float32).
    z_loss: times the mean squared log-partition, added to the loss (PaLM, arXiv 2204.02311); 0
        for none.
    activation_checkpointing: what the backward makes again instead of keeping it: "none",
        "selective" (all but matrix products and mixers) or "full" (whole blocks).
    compile: run every block through torch.compile.
    device: "auto" (CUDA where there is one), or a PyTorch device name.
    validate_every: optimizer steps between validations; one is made at the end in any case.
    checkpoint_every: optimizer steps between checkpoints; one is saved at the end in any case.
    keep_checkpoints: how many of the newest are kept.
    optimizer, schedule: the sections Optimizer and Schedule.
    """

    steps: int = Field(default=1000, ge=1)
    seq_len: int = Field(default=512, ge=2)
    rows: int = Field(default=8, ge=1)
    batch_rows: int = Field(default=8, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)  # what torch.manual_seed takes
    precision: Literal["float32", "bfloat16"] = "float32"
    z_loss: float = Field(default=0.0, ge=0)
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    device: str = "auto"
    validate_every: int = Field(default=250, ge=1)
    checkpoint_every: int = Field(default=250, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()


class Parallel(Section):
    """Several processes, started by torchrun, as a mesh of (processes / shard) × shard.

    shard: over how many processes the weights and the optimizer's state are divided: 1 (each
        process holds all of them: DDP), "all" (FSDP2), or a divisor of the processes (HSDP).
    timeout_seconds: how long a process waits for the others before it gives up.
    stall_seconds: after how long a process for which the others wait is named.
    """

    shard: Annotated[int, Field(ge=1)] | Literal["all"] = 1
    # 1e7: four months, which timedelta still holds
    timeout_seconds: float = Field(default=1800, gt=0, le=1e7)
    stall_seconds: float = Field(default=60, gt=0, le=1e7)


class Logging(Section):
    """What is written down; none of it changes the run.

    every: optimizer steps between lines of log.jsonl.
    tensorboard: also write TensorBoard events; null: where tensorboard is installed.
    wandb: the Weights & Biases project that gets the same; null: none.
    precond_every: optimizer steps between lines about the preconditioners, by layer; null: none.
    progress: show a progress bar on a terminal.
    """

    every: int = Field(default=1, ge=1)
    tensorboard: bool | None = None
    wandb: str | None = Field(default=None, min_length=1)
    precond_every: int | None = Field(default=None, ge=1)
    progress: bool = True


class Recipe(Section):
    """A whole run.

    model: fields of OSDNConfig. vocab_size may be left out: it is then the tokenizer's;
        max_position_embeddings too: it is then train.seq_len.
    data, train, parallel, logging: the sections Data, Train, Parallel and Logging.
    """

    model: dict[str, Any]
    data: Data = Data()
    train: Train = Train()
    parallel: Parallel = Parallel()
    logging: Logging = Logging()

    @field_validator("model")
    @classmethod
    def _model(cls, value: dict[str, Any]) -> dict[str, Any]:
        # Before OSDNConfig sees them: transformers would take unknown names as attributes.
        for name in value:
            if name not in MODEL_FIELDS:
                raise ValueError(_no_field(name, MODEL_FIELDS))
            kinds = _kinds(OSDNConfig.__annotations__[name])
            if isinstance(value[name], bool) and bool not in kinds:
                raise ValueError(f"{name}: expected a number, got {str(value[name]).lower()}")
        try:
            # The model's own checks, at the time the recipe is read and not an hour later.
            OSDNConfig(**value)
        except Exception as error:  # transformers' strict dataclasses raise errors of their own
            # Its last line says what is wrong.
            reason = str(error.__cause__ or error).strip().splitlines()[-1].strip()
            raise ValueError(reason) from error
        return value

    def resolved(self) -> dict[str, Any]:
        """Every field, the model's defaults included: plain values, for files and comparisons.

        Except LATER_FIELDS at the value that all runs had before there was the field.
        """
        # With all defaults: a later version with other ones must not resume this run as its own.
        config = OSDNConfig(**self.model)
        model = {name: getattr(config, name) for name in MODEL_FIELDS}
        for name in ("vocab_size", "max_position_embeddings"):  # not known from the recipe alone
            model[name] = self.model.get(name)
        resolved = {**self.model_dump(mode="json"), "model": model}
        drop_later_fields(resolved)
        return resolved


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file, with overrides such as "train.optimizer.lr=3e-3" on top.

    Raises:
        UserError: no such file, not YAML, a key that does not exist, a value of the wrong kind.
    """
    return load_sections(Recipe, path, overrides)


def load_sections(kind: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """`load_recipe` for a recipe of any kind: a Section whose fields are sections or values.

    Raises:
        UserError: no such file, not YAML, a key that does not exist, a value of the wrong kind.
    """
    try:
        raw = plain_yaml(Path(path).read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the recipe: {error}") from error
    # An empty file, or a list.
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected the sections {', '.join(kind.model_fields)}")
    # Overrides change the text's values, so that they are checked as those are.
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"{override!r}: expected key=value, such as train.steps=100")
        *parents, last = key.split(".")
        section = raw
        for name in parents:
            section = section.setdefault(name, {})  # a section that the file leaves out
            if not isinstance(section, dict):
                raise UserError(f"{key}: {name} is no section of the recipe")
        # Read as YAML: 3e-3 is a number, [a, b] a list, null nothing.
        section[last] = plain_yaml(text, override)
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        message = _first(error, kind)
        concerned = [override for override in overrides if _concerns(override, message)]
        given = f" with {' '.join(concerned)}" if concerned else ""
        raise UserError(f"{path}{given}: {message}") from None


def _concerns(override: str, message: str) -> bool:
    """Whether an error, "section.key: what is wrong", is about a value that was overridden."""
    key = override.partition("=")[0]
    where, _, wrong = message.partition(": ")
    section, _, name = key.rpartition(".")
    named = re.search(rf"(?<!\w){re.escape(name)}(?!\w)", wrong) is not None
    return key == where or where.startswith(f"{key}.") or (section == where and named)


def _no_field(name: Any, known: Sequence[str]) -> str:
    close = get_close_matches(str(name), known, n=1)
    more = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
    return f"no field {name!r}; {more}"


def _first(error: ValidationError, kind: type[Section]) -> str:
    """The first of a validation's errors as "section.key: what is wrong"; misspelt keys go first,

    since they make the right one missing. Where a field may be of several kinds, each kind has its
    error; that of the value's own kind says more than "should be a string".
    """
    kinds = ("string_type", "list_type", "dict_type")
    # min is stable: among equals the first.
    first = min(
        error.errors(), key=lambda one: (one["type"] != "extra_forbidden", one["type"] in kinds)
    )
    section: Any = kind
    path: list[str] = []
    for name in first["loc"]:
        if get_origin(section) in (list, dict):  # an index or a key, no section
            path[-1] += f"[{name}]" if isinstance(name, int) else f".{name}"
            section = get_args(section)[-1]
            continue
        if not isinstance(section, type) or not issubclass(section, Section):
            break  # within a value, such as the second name of data.corpus
        if name not in section.model_fields:
            where = ".".join(path) or "recipe"
            return f"{where}: {_no_field(name, list(section.model_fields))}"
        path.append(str(name))
        section = section.model_fields[str(name)].annotation
    got = "" if first["type"] in ("value_error", "missing") else f", got {shown(first['input'])}"
    message = first["msg"].removeprefix("Value error, ")
    where = f"{'.'.join(path)}: " if path else ""
    return f"{where}{message[:1].lower()}{message[1:]}{got}"
