"""An evaluation is an object: its fields are its options, and three methods say what it does.

items       what is to be measured, such as prompts, made for one model
answer      measures a batch of them
conclude    scores, tables and curves from all answers

    from osdn.evals.tasks import Recall, evaluate

    result = evaluate("runs/model", Recall(data="test.jsonl", limit=100), "runs/recall")
"""

from argparse import ArgumentParser, Namespace
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from osdn.errors import UserError
from osdn.evals.models import LanguageModel
from osdn.evals.runner import Record, Sample, fingerprint, measure


def option(help: str, *, default: Any = MISSING, least: float | None = None) -> Any:
    """A field of an evaluation.

    Args:
        help: what it is, for the command line.
        default: none where it must be given.
        least: the smallest value that it, or each of its values, may have.
    """
    return field(default=default, metadata={"help": help, "least": least})


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One task with its options.

    task: the name on the command line.  about: the task in half a line.
    batch: items measured together, unless `evaluate` is told otherwise.
    record: what `answer` gives for an item, as a line of samples.jsonl that may be damaged.

    Raises:
        UserError: an option below its least value.
    """

    task: ClassVar[str]
    about: ClassVar[str]
    batch: ClassVar[int] = 1
    record: ClassVar[type[Sample]] = Sample

    def __post_init__(self) -> None:
        # Once here, for the command line, YAML files and Python alike.
        for one in fields(self):
            given, least = getattr(self, one.name), one.metadata["least"]
            for value in given if isinstance(given, list | tuple) else [given]:
                if least is not None and value is not None and value < least:
                    raise UserError(f"{one.name}: expected at least {least}, got {value}")

    def items(self, model: LanguageModel) -> tuple[dict[str, Any], list[Record]]:
        """(what the protocol adds to the fields, the items: each with an "id" of its own)."""
        raise NotImplementedError

    def answer(
        self, model: LanguageModel, items: list[Record], protocol: dict[str, Any]
    ) -> list[Record]:
        """Measure a batch: one record for each item."""
        raise NotImplementedError

    def conclude(
        self, model: LanguageModel, protocol: dict[str, Any], records: list[Record]
    ) -> dict[str, Any]:
        """The result (osdn.evals.results) of all records."""
        raise NotImplementedError

    def run(self, model: LanguageModel, out: Path, batch: int) -> dict[str, Any]:
        """Measure a model; what was measured in `out` before is not measured again."""
        added, items = self.items(model)
        # All options are in it, so that a directory is never continued with other ones.
        protocol = asdict(self) | added
        records = measure(
            out,
            items,
            lambda some: self.answer(model, some, protocol),
            # Of the weights too: another model of the same name is another measurement.
            protocol=protocol | {"fingerprint": fingerprint(model.model, items)},
            batch=batch,
            name=self.task,
            schema=self.record,
        )
        return self.conclude(model, protocol, records)


E = TypeVar("E", bound=Evaluation)


def add_options(parser: ArgumentParser, kind: type[Evaluation]) -> None:
    """An option of the command line for each field."""
    # The command line is made from the fields, so that the two cannot differ.
    hints = get_type_hints(kind)
    for one in fields(kind):
        words, default = one.metadata["help"], one.default
        if default not in (MISSING, None) and not isinstance(default, bool):
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            words = f"{words} (default: {shown})"
        name = f"--{one.name.replace('_', '-')}"
        if hints[one.name] is bool:  # a flag
            parser.add_argument(name, action="store_true", help=words)
            continue
        options: dict[str, Any] = {"required": default is MISSING, "help": words}
        parser.add_argument(name, **options, **_values(hints[one.name]))


def _values(hint: Any) -> dict[str, Any]:
    """What argparse is to be told of a field of this type: T, T | None, tuple[T, ...], Literal."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    for kind in kinds:
        if get_origin(kind) is tuple:
            return {"nargs": "+", "type": get_args(kind)[0]}
        if get_origin(kind) is Literal:
            return {"choices": get_args(kind)}
    return {"type": next(kind for kind in kinds if kind is not NoneType)}


def from_options(kind: type[E], args: Namespace) -> E:
    """The evaluation that parsed options ask for; what was not given keeps its default."""
    given = {one.name: getattr(args, one.name) for one in fields(kind)}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    # None: not given. The field's default then says what that means.
    return kind(**{name: value for name, value in given.items() if value is not None})
