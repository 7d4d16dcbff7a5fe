"""`python -m study packages`: a corpus of the Python packages that this machine has installed.

It needs no network, and source code repeats its names, which is what the measure of in-context
repeats (osdn.evals.repeats) reads. Every file's content is taken once. What is held out is decided
by package. A document is a piece of one package: its files in the order of their paths, each under
a comment with its path, cut at a line's end. The result, OUT/:

train.jsonl, validation.jsonl    {"text", "source"}; source is the package
tokenizer/                       byte-level BPE, trained on train.jsonl
shards/                          train.jsonl as tokens, as `osdn tokenize` makes them
manifest.json                    versions, counts, and one digest of all text
"""

import argparse
import json
import sys
from collections.abc import Iterator
from hashlib import blake2b
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

from osdn.data import load_tokenizer
from osdn.data.corpora import open_corpus
from osdn.data.tokenize import write_shards
from osdn.errors import UserError
from study.corpus import is_held_out, train_tokenizer, write_records

PIECE = 65_536  # characters of a document, about 20,000 tokens: longer than any measured context
LARGEST = 1_000_000  # bytes of a file; larger ones are tables, not source that someone wrote
COPIES = ("_vendor", "vendored", "_vendored_packages")  # other packages' files under another name

Record = dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where packages are looked for, how much is kept, and where it goes."""
    parser.add_argument("--out", type=Path, default=Path("runs/packages"))
    parser.add_argument(
        "--path",
        nargs="+",
        help="directories with installed packages (default: this interpreter's own)",
    )
    parser.add_argument("--held-out", type=float, default=0.1, help="share of packages (0.1)")
    parser.add_argument(
        "--train-bytes", type=int, default=200_000_000, help="of training text at most"
    )
    parser.add_argument(
        "--validation-bytes", type=int, default=3_000_000, help="of held-out text at most"
    )
    parser.add_argument("--vocabulary", type=int, default=8192, help="tokens (8,192)")
    parser.add_argument("--processes", type=int, default=2, help="that encode (2)")


def run(args: argparse.Namespace) -> None:
    """Collect, split, train the tokenizer, encode."""
    if not 0 < args.held_out < 1:
        raise UserError(f"--held-out: expected a share in (0, 1), got {args.held_out}")
    for name in ("train_bytes", "validation_bytes", "processes"):
        if getattr(args, name) < 1:
            option = name.replace("_", "-")
            raise UserError(f"--{option}: expected at least 1, got {getattr(args, name)}")
    versions, pieces = collect(args.path or sys.path)
    train, held = split(pieces, args.held_out, args.train_bytes, args.validation_bytes)
    if not train or not held:
        raise UserError(
            f"--path: {len(versions)} packages with source, of which {len(held)} pieces are held "
            "out; more packages or another --held-out are needed"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    write_records(args.out / "train.jsonl", train)
    write_records(args.out / "validation.jsonl", held)
    words = args.out / "tokenizer"
    texts = (one["text"] for one in train)
    train_tokenizer(texts, words, vocabulary=args.vocabulary, limit=40_000_000)
    with tqdm(unit="B", unit_scale=True, disable=None) as bar:
        made = write_shards(
            open_corpus(str(args.out / "train.jsonl")),
            load_tokenizer(str(words)),
            args.out / "shards",
            name=str(words),
            shard_tokens=10**9,
            processes=args.processes,
            bar=bar,
        )
    counts = {"train": count(train), "validation": count(held)}
    manifest = {
        "digest": digest([*train, *held]),
        "python": sys.version.partition(" ")[0],
        "counts": counts,
        "tokens": made["tokens"],
        "packages": {name: versions[name] for name in sorted(versions)},
        "held_out": sorted({one["source"] for one in held}),
    }
    (args.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    for name, sizes in counts.items():
        print(f"{name}: {', '.join(f'{n:,} {word}' for word, n in sizes.items())}")
    print(f"{made['tokens']:,} training tokens in {args.out}, digest {manifest['digest']}")


def collect(path: list[str]) -> tuple[dict[str, str], list[Record]]:
    """(package -> version, the pieces of every package), packages in the order of their names.

    A content that an earlier package has is left out.
    """
    found: dict[str, metadata.Distribution] = {}
    for one in metadata.distributions(path=list(path)):
        found.setdefault(one.metadata["Name"].lower().replace("_", "-"), one)
    seen: set[bytes] = set()
    versions: dict[str, str] = {}
    pieces: list[Record] = []
    for name, one in sorted(found.items()):
        new = [{"text": text, "source": name} for text in cut(sources(one, seen))]
        if new:
            versions[name] = one.version
            pieces += new
    return versions, pieces


def sources(one: metadata.Distribution, seen: set[bytes]) -> Iterator[str]:
    """The Python files of a package that are not in `seen`, each under a comment with its path."""
    for file in sorted(one.files or [], key=str):
        if file.suffix != ".py" or any(part in COPIES for part in file.parts):
            continue
        try:
            data = Path(str(file.locate())).read_bytes()
            text = data.decode()
        except (OSError, UnicodeDecodeError):
            continue  # listed and not there, or not UTF-8
        content = blake2b(data, digest_size=16).digest()
        if text.strip() and len(data) <= LARGEST and content not in seen:
            seen.add(content)
            yield f"# {file}\n{text.strip()}\n\n"


def cut(texts: Iterator[str]) -> Iterator[str]:
    """The texts end to end, in pieces of at most PIECE characters that end with a line."""
    left = ""
    for text in texts:
        left += text
        while len(left) > PIECE:
            end = left.rfind("\n", 0, PIECE) + 1 or PIECE
            yield left[:end]
            left = left[end:]
    if left:
        yield left


def split(
    pieces: list[Record], share: float, train_bytes: int, validation_bytes: int
) -> tuple[list[Record], list[Record]]:
    """(training, held-out) pieces in an order that the text's hash decides, up to the sizes.

    A held-out package gives at most a quarter of the held-out bytes.
    """
    train: list[Record] = []
    held: list[Record] = []
    size = {False: 0, True: 0}
    limit = {False: train_bytes, True: validation_bytes}
    given: dict[str, int] = {}
    for one in sorted(pieces, key=lambda one: blake2b(one["text"].encode()).digest()):
        side, own = is_held_out(one["source"], share), len(one["text"].encode())
        package = given.get(one["source"], 0) + own
        if size[side] + own > limit[side] or (side and 4 * package > validation_bytes):
            continue
        given[one["source"]] = package
        size[side] += own
        (held if side else train).append(one)
    return train, held


def count(records: list[Record]) -> dict[str, int]:
    """Documents, bytes and packages."""
    return {
        "documents": len(records),
        "bytes": sum(len(one["text"].encode()) for one in records),
        "packages": len({one["source"] for one in records}),
    }


def digest(records: list[Record]) -> str:
    """16 hexadecimal digits of all text, in its order."""
    found = blake2b(digest_size=8)
    for one in records:
        found.update(one["text"].encode())
    return found.hexdigest()
