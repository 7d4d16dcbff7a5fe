"""JSON that may come from anywhere: limited in size and depth, and compared with a schema.

Files of results, checkpoints and shards are copied, edited and downloaded. They are read here and
nowhere else, so that what is wrong with one is a line that names the file and the field. Pydantic's
parser refuses more than 200 levels of nesting and integers of more than 4,300 digits.
"""

from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from osdn.errors import UserError

LARGEST = 2**28  # bytes of a file that is read at once; a training's log has 200 bytes a line
SHOWN = 60  # characters of a wrong value in a message

T = TypeVar("T")
# A measured number: a training that diverged leaves NaN, which our files hold as NaN.
Measure = Annotated[float, Field(allow_inf_nan=True)]


class Outside(BaseModel):
    """Base of schemas: no value changes its type, and fields that are not named here are kept."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)


class Malformed(UserError):
    """A text is not JSON, or not what the schema describes.

    reason: what is wrong, without the name of the source.
    """

    def __init__(self, source: str, reason: str, advice: str = "") -> None:
        self.reason = reason
        super().__init__(f"{source}: {reason}{advice and '; '}{advice}")


def read_json(path: Path, schema: type[T], advice: str = "") -> T:
    """The content of a JSON file.

    Args:
        schema: a class of `Outside`, or a type such as dict[str, str].
        advice: the end of the message, what to do.

    Raises:
        Malformed: not JSON, or not the schema's.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    # By its size, before a byte is read.
    if path.is_file() and size > LARGEST:
        raise Malformed(str(path), f"expected at most {LARGEST:,} bytes, found {size:,}", advice)
    return parse_json(path.read_bytes(), schema, str(path), advice)


def parse_json(text: str | bytes, schema: type[T], source: str, advice: str = "") -> T:
    """As read_json, of a text; `source` names it in the message."""
    try:
        found: T = _adapter(schema).validate_json(text, strict=True)  # type: ignore[arg-type]
        return found
    except ValidationError as error:
        raise Malformed(source, _reason(error), advice) from None


def parse_plain(text: str | bytes, schema: Any, source: str, advice: str = "") -> Any:
    """As parse_json, but the plain values: a 1 stays an integer where a float may stand."""
    parse_json(text, schema, source, advice)
    return parse_json(text, Any, source, advice)  # type: ignore[arg-type]


@cache
def _adapter(schema: Any) -> TypeAdapter:
    """Building one takes longer than a line of JSON."""
    return TypeAdapter(schema)


def _reason(error: ValidationError) -> str:
    """The first of the errors, in a line."""
    # One error a line: the others are often its consequences.
    first = error.errors(include_url=False)[0]
    message = first["msg"][:1].lower() + first["msg"][1:]
    if first["type"] == "json_invalid":
        return "not JSON: " + message.removeprefix("invalid JSON: ")
    where = ".".join(str(part) for part in first["loc"])
    got = "" if first["type"] in ("missing", "value_error") else f", got {shown(first['input'])}"
    return f"{where + ': ' if where else ''}{message}{got}"


def shown(value: Any) -> str:
    """A value for a message: one short line, whatever it is."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = value if isinstance(value, str) else repr(value)
    text = repr(text[:SHOWN]) if isinstance(value, str) else text[:SHOWN]
    return text + ("…" if len(str(value)) > SHOWN else "")
