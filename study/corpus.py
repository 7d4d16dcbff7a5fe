"""`python -m study corpus RECIPE`: build a corpus from Debian packages and their index.

Documents are the records of the package index and the documentation in the packages that the recipe
lists. What is held out is decided by source package, by the same hash for both, so that no held-out
document has a sibling in training. The result, OUT/:

train.jsonl, validation.jsonl    {"text", "source", "path"}; path is "index" for index records
recall.jsonl                     questions on held-out index records (study.recall_sets)
tokenizer/                       byte-level BPE, trained on train.jsonl
manifest.json                    versions of the packages, counts of documents and bytes
"""

import argparse
import json
import lzma
import re
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

from pydantic import Field
from tqdm import tqdm

from osdn.data.tokenizers import END_OF_TEXT, PAD
from osdn.errors import UserError
from osdn.system.files import replacing, write_json
from osdn.system.processes import end_with_parent
from osdn.train.recipe import Section, load_sections
from study import recall_sets
from study.text import documents

STOPWORDS = frozenset(
    re.findall(
        r"\w+",
        "the of to and a in is for that it be are this with on or as by an not from if can you",
    )
)
LONG_LINE = 40  # characters; a line at least that long occurs once in the whole documentation


class CorpusRecipe(Section):
    """What goes into a corpus.

    packages: names of Debian packages, downloaded in the version that the machine's index has.
    held_out: share of source packages that are not trained on, in (0, 1).
    questions: recall questions on held-out index records, at most.
    train_bytes: UTF-8 bytes of documentation to train on, at most.
    validation_bytes: UTF-8 bytes of held-out documents, at most.
    source_bytes: UTF-8 bytes of documentation from one source package, at most.
    shortest, longest: characters of a document; a longer one is cut at a line's end.
    english: least share of common English words among a document's words.
    vocabulary: tokens of the tokenizer.
    tokenizer_bytes: UTF-8 bytes of training text that the tokenizer is trained on.
    """

    packages: list[str] = Field(min_length=1)
    held_out: float = Field(default=0.1, gt=0, lt=1)
    questions: int = Field(default=2000, ge=1)
    train_bytes: int = Field(default=200_000_000, ge=1)
    validation_bytes: int = Field(default=6_000_000, ge=1)
    source_bytes: int = Field(default=4_000_000, ge=1)
    shortest: int = Field(default=400, ge=1)
    longest: int = Field(default=100_000, ge=1)
    english: float = Field(default=0.1, ge=0, lt=1)
    vocabulary: int = Field(default=16_384, ge=300)
    tokenizer_bytes: int = Field(default=40_000_000, ge=1)


Record = dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Recipe, overrides, places."""
    parser.add_argument("recipe", type=Path, help="such as study/recipes/corpus.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--out", type=Path, default=Path("runs/corpus"), help="of the corpus")
    parser.add_argument("--debs", type=Path, help="where the packages are kept (default: OUT/debs)")
    parser.add_argument("--archive", type=Path, help="also write all of it as this .tar.xz")
    parser.add_argument("--index", type=Path, help="a Packages file, not apt-cache dumpavail")
    parser.add_argument("--processes", type=int, default=2, help="that read packages (2)")


def run(args: argparse.Namespace) -> None:
    """Download, extract, split, train the tokenizer, count."""
    recipe = load_sections(CorpusRecipe, args.recipe, args.overrides)
    debs = args.debs or args.out / "debs"
    index = recall_sets.read_index(args.index)
    files = download(recipe.packages, debs)
    manifest = build(recipe, index, files, args.out, processes=args.processes)
    for name, sizes in manifest["counts"].items():
        print(f"{name}: {sizes['documents']:,} documents, {sizes['bytes']:,} bytes")
    if args.archive:
        pack(args.out, args.archive)
        print(f"{args.archive}: {args.archive.stat().st_size:,} bytes")


def download(packages: list[str], directory: Path) -> list[Path]:
    """The packages' files, one each, in the packages' order; apt-get fetches what is missing.

    Raises:
        UserError: apt-get cannot fetch one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    missing = [name for name in packages if not list(directory.glob(f"{name}_*.deb"))]
    if missing:
        try:
            subprocess.run(["apt-get", "download", "-q", *missing], cwd=directory, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(
                f"packages: apt-get download failed for one of {len(missing)} packages, such as "
                f"{missing[0]}; run apt-get update first, or leave out what this release lacks"
            ) from error
    return [sorted(directory.glob(f"{name}_*.deb"))[-1] for name in packages]


def is_held_out(source: str, share: float) -> bool:
    """Whether a source package is on the held-out side; the hash of the recall sets."""
    return recall_sets.share_of(source) < share


def read_package(file: Path) -> tuple[str, str, list[tuple[str, str]]]:
    """(source package, version, documents) of a .deb."""
    shown = subprocess.run(
        ["dpkg-deb", "-f", str(file), "Package", "Source", "Version"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    fields = dict(line.split(": ", 1) for line in shown.splitlines())
    source = fields.get("Source", fields["Package"]).partition(" ")[0]
    return source, fields["Version"], list(documents(file))


class Documentation:
    """Takes documents of packages, one after another; keeps those that are new English text."""

    def __init__(self, recipe: CorpusRecipe):
        self.recipe = recipe
        self.lines: set[int] = set()
        self.sources: dict[str, int] = {}

    def keep(self, source: str, text: str) -> str | None:
        """The text without lines that an earlier document has; None if it is to be left out.

        It is if half of it is gone so, or what is left is short, not English, or too much of its
        source. The lines of a document that is left out count as seen, too.
        """
        whole, kept = len(text), []
        for line in text.split("\n"):
            if len(line) >= LONG_LINE:
                key = int.from_bytes(blake2b(line.encode(), digest_size=8).digest())
                if key in self.lines:
                    continue
                self.lines.add(key)
            kept.append(line)
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()
        if 2 * len(text) < whole:
            return None
        if len(text) > self.recipe.longest:
            text = text[: text.rfind("\n", 0, self.recipe.longest) + 1 or self.recipe.longest]
        words = re.findall(r"[^\W\d_]+", text.lower())
        common = sum(word in STOPWORDS for word in words)
        if len(text) < self.recipe.shortest or common < self.recipe.english * len(words):
            return None
        size = self.sources.get(source, 0) + len(text.encode())
        if not words or size > self.recipe.source_bytes:
            return None
        self.sources[source] = size
        return text


def build(
    recipe: CorpusRecipe, index: list[str], files: list[Path], out: Path, *, processes: int
) -> dict[str, Any]:
    """Write the corpus to `out`; returns the manifest."""
    questions = recall_sets.build(
        recall_sets.debian(index), test_share=recipe.held_out, limit=recipe.questions
    )
    train = [{**one, "path": "index"} for one in questions["train"]]
    held: list[Record] = [
        {"text": one["text"], "source": one["source"], "path": "index"}
        for one in questions["test"]
    ]  # fmt: skip
    versions: dict[str, str] = {}
    sizes = {False: 0, True: 0}
    limits = {False: recipe.train_bytes, True: recipe.validation_bytes}
    filters = Documentation(recipe)
    with ProcessPoolExecutor(processes, initializer=end_with_parent) as pool:
        found = pool.map(read_package, files)
        for file, (source, version, texts) in zip(files, tqdm(found, total=len(files))):
            versions[file.name.partition("_")[0]] = version
            side = is_held_out(source, recipe.held_out)
            for path, text in texts:
                if sizes[side] < limits[side] and (kept := filters.keep(source, text)):
                    sizes[side] += len(kept.encode())
                    (held if side else train).append({"text": kept, "source": source, "path": path})
    out.mkdir(parents=True, exist_ok=True)
    for name, records in (
        ("train", train), ("validation", held), ("recall", questions["test"])
    ):  # fmt: skip
        records.sort(key=lambda one: blake2b(one["text"].encode(), digest_size=8).digest())
        write_records(out / f"{name}.jsonl", records)
    train_tokenizer(
        (one["text"] for one in train),
        out / "tokenizer",
        vocabulary=recipe.vocabulary,
        limit=recipe.tokenizer_bytes,
    )
    manifest = {
        "recipe": recipe.model_dump(mode="json", exclude={"packages"}),
        "packages": versions,
        "counts": counts(train, held, questions["test"]),
    }
    write_json(out / "manifest.json", manifest)
    return manifest


def counts(train: list[Record], held: list[Record], asked: list[Record]) -> dict[str, Any]:
    """Documents, bytes and sources of every part."""
    parts = {
        "train, index": [one for one in train if one["path"] == "index"],
        "train, documentation": [one for one in train if one["path"] != "index"],
        "validation, index": [one for one in held if one["path"] == "index"],
        "validation, documentation": [one for one in held if one["path"] != "index"],
        "recall": asked,
    }
    return {
        name: {
            "documents": len(records),
            "bytes": sum(len(one["text"].encode()) for one in records),
            "sources": len({one["source"] for one in records}),
        }
        for name, records in parts.items()
    }


def train_tokenizer(texts: Iterable[str], out: Path, *, vocabulary: int, limit: int) -> None:
    """Byte-level BPE on the first `limit` UTF-8 bytes of the texts, saved for AutoTokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def some() -> Iterator[str]:
        left = limit
        for text in texts:
            yield text
            left -= len(text.encode())
            if left <= 0:
                return

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(some(), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(out)


def write_records(path: Path, records: list[Record]) -> None:
    """One JSON object a line, written whole."""
    with replacing(path) as file:
        for record in records:
            file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())


def pack(directory: Path, archive: Path) -> None:
    """directory/ as a .tar.xz, without times and owners, so that equal corpora are equal files."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.mtime = info.uid = info.gid = 0
        info.uname = info.gname = ""
        return info

    archive.parent.mkdir(parents=True, exist_ok=True)
    names = ("train.jsonl", "validation.jsonl", "recall.jsonl", "manifest.json", "tokenizer")
    with lzma.open(archive, "wb", preset=6) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for name in names:
            tar.add(directory / name, arcname=f"corpus/{name}", filter=plain)
