"""Recall sets: records of text, key and value, from a file, the hub, or built on this machine.

A sample asks for the value of one field of one real document. The builders read the Debian package
index (`apt-cache dumpavail`) or the METADATA of installed Python distributions, split by source
package, and keep only fields that a guesser who knows the training side cannot answer.
"""

import json
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from osdn.errors import UserError
from osdn.system.hub import hub_is_reachable

HUB_SETS = {
    "fda": "hazyresearch/based-fda",
    "swde": "hazyresearch/based-swde-v2",
    "squad": "hazyresearch/based-squad",
}
LONGEST_VALUE, LONGEST_DOCUMENT = 40, 4000  # characters
GUESSABLE = 0.02  # share of a field's training values that its most frequent one may have
NOISE = ("MD5sum", "SHA1", "SHA256", "Description-md5", "Classifier", "Provides-Extra")


class Document(NamedTuple):
    """A real document: its text, the source it comes from, and its one-line fields."""

    text: str
    source: str
    fields: dict[str, str]


def read_samples(name: str) -> list[dict[str, str]]:
    """The samples of fda, swde or squad from the hub, or of a .jsonl file: text, key, value.

    Values of one character are left out, as in the published protocol.

    Raises:
        UserError: no such file or set, no network, a record without those fields, no sample.
    """
    records = _hub(HUB_SETS[name]) if name in HUB_SETS else _jsonl(Path(name))
    samples = []
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
            raise UserError(f"--data: cannot read {name}: {error}") from error
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
            f"--data: cannot read {path}: {error}; give a .jsonl file with the fields text, key "
            f"and value (osdn eval build-recall makes one), or one of {', '.join(HUB_SETS)}"
        ) from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not JSON: {error}") from error


def _hub(name: str) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError("--data: hub sets need datasets: pip install 'osdn[data]'") from error
    try:
        data = load_dataset(name, split="validation", download_mode="reuse_dataset_if_exists")
    except Exception as error:  # the client has a dozen kinds
        offline = "" if hub_is_reachable() else ": there is no network, and it is not cached here"
        raise UserError(
            f"--data: cannot load {name} from the Hugging Face hub{offline}; osdn eval "
            "build-recall builds a set from this machine"
        ) from error
    return ((f"row {i}", record) for i, record in enumerate(data))


def debian(lines: Iterable[str]) -> Iterator[Document]:
    """The records of a Debian package index, checksums left out."""
    for lines_of_one in _paragraphs(lines):
        fields = _fields(lines_of_one)
        package = fields.get("Package")
        if package:
            source = fields.get("Source", package).partition(" ")[0]
            yield Document(_text(lines_of_one), source, fields)


def distributions(paths: list[str] | None = None) -> Iterator[Document]:
    """The METADATA of the Python distributions on sys.path, or in the given directories."""
    found = metadata.distributions(path=paths) if paths else metadata.distributions()
    for distribution in found:
        text = distribution.read_text("METADATA")
        if text:
            head = next(_paragraphs(text.splitlines()), [])
            fields = _fields(head)
            if "Name" in fields:
                yield Document(_text(head), fields["Name"].lower().replace("_", "-"), fields)


def _paragraphs(lines: Iterable[str]) -> Iterator[list[str]]:
    block: list[str] = []
    for line in lines:
        if line.strip():
            block.append(line.rstrip())
        elif block:
            yield block
            block = []
    if block:
        yield block


def _kept(lines: list[str]) -> Iterator[str]:
    """The lines of all fields but NOISE, continuation lines included."""
    keep = True
    for line in lines:
        if line[0] not in " \t":
            keep = line.partition(":")[0] not in NOISE
        if keep:
            yield line


def _text(lines: list[str]) -> str:
    return "\n".join(_kept(lines))[:LONGEST_DOCUMENT]


def _fields(lines: list[str]) -> dict[str, str]:
    """Fields of one line; one that goes on in the next line or comes twice is left out."""
    values: dict[str, str] = {}
    seen: Counter[str] = Counter()
    name = ""
    for line in _kept(lines):
        if line[0] in " \t":
            values.pop(name, None)
            continue
        name, _, value = line.partition(":")
        seen[name] += 1
        values[name] = value.strip()
    return {name: value for name, value in values.items() if seen[name] == 1}


def build(documents: Iterable[Document], *, test_share: float, limit: int) -> dict[str, Any]:
    """Split by source, find the fields whose values cannot be guessed, ask one in each document.

    A field is asked for if its most frequent training value covers at most 2% of the training
    documents that have it. The value must be 2 to 40 characters, and stand in the text that is
    kept. Which field of a document is asked is decided by a hash of the document.

    Returns:
        {"train": [{text, source}], "test": [{text, key, value, source, guess}], "fields": {...}};
        `guess` is the field's most frequent training value.

    Raises:
        UserError: nothing left to ask.
    """
    train: list[Document] = []
    test: list[Document] = []
    seen: set[str] = set()
    for document in documents:
        if document.text not in seen:
            seen.add(document.text)
            (test if share_of(document.source) < test_share else train).append(document)
    counts: dict[str, Counter[str]] = {}
    for document in train:
        for name, value in document.fields.items():
            counts.setdefault(name, Counter())[value] += 1
    fields: dict[str, dict[str, Any]] = {}
    for name, values in counts.items():
        guess, times = values.most_common(1)[0]
        if times <= max(1, GUESSABLE * values.total()):
            fields[name] = {"guess": guess, "share": times / values.total(), "n": values.total()}
    subjects = {"Package", "Name"}  # what the document is about is no question
    samples: list[dict[str, str]] = []
    for document in sorted(test, key=lambda one: share_of(one.text)):
        names = [
            name
            for name, value in sorted(document.fields.items())
            if name in fields
            and name not in subjects
            and 1 < len(value) <= LONGEST_VALUE
            and value in document.text
        ]
        if names and len(samples) < limit:
            key = names[int(share_of("field of " + document.text) * len(names))]
            sample = {"text": document.text, "key": key, "value": document.fields[key]}
            samples.append(sample | {"source": document.source, "guess": fields[key]["guess"]})
    if not samples:
        raise UserError(
            f"nothing to ask: {len(train)} training and {len(test)} test documents, and no field "
            "whose value cannot be guessed; give a larger source or another --test-share"
        )
    texts = [{"text": one.text, "source": one.source} for one in train]
    return {"train": texts, "test": samples, "fields": fields}


def share_of(text: str) -> float:
    """A number in [0, 1) that the text decides."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) / 2**64


def read_index(path: Path | None) -> list[str]:
    """The lines of a Debian package index: of that file, or as `apt-cache dumpavail` prints it.

    Raises:
        UserError: the file cannot be read, there is no apt-cache, or its index is empty.
    """
    if path is not None:
        try:
            return path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise UserError(f"--index: cannot read {path}: {error.strerror}") from error
    try:
        dump = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            "debian: no apt-cache on this machine; give an index with --index (a Packages file), "
            "or build from metadata"
        ) from error
    if not dump.strip():
        raise UserError("debian: the package index is empty; run apt-get update first")
    return dump.decode(errors="replace").splitlines()
