"""`python -m study recall debian|metadata`: build a recall set from what is on this machine.

A sample asks for the value of one field of one real document. The builders read the Debian package
index (`apt-cache dumpavail`) or the METADATA of installed Python distributions, split by source
package, and keep only fields that a guesser who knows the training side cannot answer.
"""

import argparse
import json
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from osdn.errors import UserError

LONGEST_VALUE, LONGEST_DOCUMENT = 40, 4000  # characters
GUESSABLE = 0.02  # share of a field's training values that its most frequent one may have
NOISE = ("MD5sum", "SHA1", "SHA256", "Description-md5", "Classifier", "Provides-Extra")


class PackageRecord(NamedTuple):
    """What a package says of itself: the text, its source package, and its one-line fields."""

    text: str
    source: str
    fields: dict[str, str]


def debian(lines: Iterable[str]) -> Iterator[PackageRecord]:
    """The records of a Debian package index, checksums left out."""
    for lines_of_one in _paragraphs(lines):
        fields = _fields(lines_of_one)
        package = fields.get("Package")
        if package:
            source = fields.get("Source", package).partition(" ")[0]
            yield PackageRecord(_text(lines_of_one), source, fields)


def distributions(paths: list[str] | None = None) -> Iterator[PackageRecord]:
    """The METADATA of the Python distributions on sys.path, or in the given directories."""
    found = metadata.distributions(path=paths) if paths else metadata.distributions()
    for distribution in found:
        text = distribution.read_text("METADATA")
        if text:
            head = next(_paragraphs(text.splitlines()), [])
            fields = _fields(head)
            if "Name" in fields:
                yield PackageRecord(_text(head), fields["Name"].lower().replace("_", "-"), fields)


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


def build(documents: Iterable[PackageRecord], *, test_share: float, limit: int) -> dict[str, Any]:
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
    train: list[PackageRecord] = []
    test: list[PackageRecord] = []
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Source, place and sizes."""
    parser.add_argument(
        "source",
        choices=["debian", "metadata"],
        help="debian: the package index that apt-get update fetched; metadata: the METADATA files "
        "of installed Python distributions",
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the set")
    parser.add_argument(
        "--path", nargs="+", help="metadata: site-packages directories (default: this Python's)"
    )
    parser.add_argument(
        "--index", type=Path, help="debian: an index file to read instead of apt-cache dumpavail"
    )
    parser.add_argument("--test-share", type=float, default=0.1, help="of the sources")
    parser.add_argument("--limit", type=int, default=2000, help="test samples at most")


def run(args: argparse.Namespace) -> None:
    """Build a set and say what is in it."""
    if not 0 < args.test_share < 1:
        raise UserError(f"--test-share: expected a share in (0, 1), got {args.test_share}")
    installed = args.source == "metadata"
    documents = distributions(args.path) if installed else debian(read_index(args.index))
    found = build(documents, test_share=args.test_share, limit=args.limit)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for name in ("train", "test"):
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in found[name])
            (args.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        (args.out / "fields.json").write_text(json.dumps(found["fields"], indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{args.out}: cannot write: {error.strerror or error}") from error
    asked = Counter(sample["key"] for sample in found["test"]).most_common()
    print(
        f"{args.out}: {len(found['train']):,} documents to train on (train.jsonl), "
        f"{len(found['test']):,} questions on others' sources (test.jsonl)\n"
        f"fields asked for: {', '.join(f'{name} {n}' for name, n in asked)}"
    )


def read_index(path: Path | None) -> list[str]:
    """The lines of a package index: of the file, or of this machine's apt-cache."""
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
