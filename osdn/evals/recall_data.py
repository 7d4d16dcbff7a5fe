"""Recall sets: records of text, key and value, from a file or the hub.

A sample asks for the value of one field of one real document.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from osdn.errors import UserError
from osdn.system.hub import hub_is_reachable
from osdn.system.outside import Malformed, parse_plain

HUB_SETS = {
    "fda": "hazyresearch/based-fda",
    "swde": "hazyresearch/based-swde-v2",
    "squad": "hazyresearch/based-squad",
}


def read_samples(name: str) -> list[dict[str, str]]:
    """The samples of fda, swde or squad from the hub, or of a .jsonl file: text, key, value.

    Values of one character are left out, as in the published protocol.

    Raises:
        UserError: no such file or set, no network, a record without those fields, no sample.
    """
    records = _hub(HUB_SETS[name]) if name in HUB_SETS else _jsonl(Path(name))
    samples = []
    # Every record is looked at before the first is measured.
    for where, record in records:
        fields = record if isinstance(record, dict) else {}
        wrong = [one for one in ("text", "key", "value") if not _is_text(fields.get(one))]
        if wrong or not _is_text(fields.get("guess", "")):
            raise UserError(
                f"{name}, {where}: expected the fields text, key and value with text in them, and "
                f"in guess if it is there; wrong: {', '.join(wrong) or 'guess'}"
            )
        if len(record["value"].strip()) > 1:
            samples.append(record)
    if not samples:
        raise UserError(f"{name}: no sample with a value of more than one character in it")
    return samples


def _is_text(value: Any) -> bool:
    """Whether it is a string, and none that JSON has made of half a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= x <= "\udfff" for x in value)


def read_prompts(name: str, limit: int) -> list[str]:
    """At most `limit` texts: the field text of a .jsonl file or hub set, or a whole text file."""
    path = Path(name)
    if name not in HUB_SETS and path.suffix != ".jsonl":
        try:
            return [path.read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data: cannot read {name}: {error}") from error
    # Fields other than text are not needed here.
    records = _hub(HUB_SETS[name]) if name in HUB_SETS else _jsonl(path)
    texts = []
    for where, record in islice(records, limit):
        if not isinstance(record, dict) or not _is_text(record.get("text")):
            raise UserError(f"{name}, {where}: expected a field text with text in it")
        texts.append(record["text"])
    return texts


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        # JSON may hold U+2028 and other separators as they are, where splitlines() would cut too.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data: cannot read {path}: {error}; give a .jsonl file with the fields text, key "
            f"and value, or one of {', '.join(HUB_SETS)}"
        ) from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield f"line {number}", parse_plain(line, Any, "")
            except Malformed as error:
                raise UserError(f"{path}, line {number}: {error.reason}") from error


def _hub(name: str) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError("data: hub sets need datasets: pip install 'osdn[data]'") from error
    try:
        data = load_dataset(name, split="validation", download_mode="reuse_dataset_if_exists")
    except Exception as error:  # the client has a dozen kinds
        offline = "" if hub_is_reachable() else ": there is no network, and it is not cached here"
        raise UserError(
            f"data: cannot load {name} from the Hugging Face hub{offline}; give a "
            ".jsonl file instead"
        ) from error
    return ((f"row {i}", record) for i, record in enumerate(data))
