"""Where documents come from: files, a streamed Hugging Face dataset, or Python's own library.

A corpus has a `fingerprint` (a string that changes when its files do) and

    read(order=..., position=..., share=...) -> iterator of (Document, position after it)

`order` seeds the permutation of the files (None: sorted by name); `position` is what an earlier
reading with the same order and share gave, and the reading goes on behind it. A position is a list
or dictionary of plain numbers and strings. Nothing is held in memory but the document being read.

`share` is one of n parts that make up the corpus. Each part reads files of its own where there are
n files or more; else the files fall into as many groups as the largest divisor of n allows, and the
parts of a group all read it, each keeping every so-manieth document.
"""

from collections.abc import Iterator, Sequence
from glob import escape, glob
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from random import Random
from sysconfig import get_path
from typing import Any, NamedTuple, Protocol

from osdn.data.readers import READERS, Found, read_text
from osdn.errors import UserError
from osdn.system.hub import hub_is_reachable
from osdn.system.retry import persevere

HUB = "hf:"


class Document(NamedTuple):
    """One text, and the 64-bit hash of its content, which decides its side of the split."""

    text: str
    key: int


class Share(NamedTuple):
    """Part `part` of `of` parts of a corpus, counted from 0."""

    part: int
    of: int

    def among(self, files: int) -> tuple[int, int, int, int]:
        """(groups, this part's group, parts in a group, this part's number in it)."""
        groups = max(d for d in range(1, self.of + 1) if self.of % d == 0 and d <= max(files, 1))
        return groups, self.part % groups, self.of // groups, self.part // groups


WHOLE = Share(0, 1)


class Corpus(Protocol):
    """See the module's docstring."""

    fingerprint: str
    size: int | None  # bytes to read, where that is known

    def read(
        self, *, order: str | None = None, position: Any = None, share: Share = WHOLE
    ) -> Iterator[tuple[Document, Any]]: ...

    def done(self, position: Any) -> int: ...


def open_corpus(
    names: str | Sequence[str],
    *,
    text_field: str = "text",
    separator: str | None = None,
    subset: str | None = None,
    split: str = "train",
) -> Corpus:
    """The corpus that a recipe names.

    Args:
        names: "stdlib" (the Python standard library's source on this machine), "hf:NAME" (a
            Hugging Face dataset, streamed), a directory of shards that `osdn tokenize` made (a
            ShardCorpus; the other options are not for it), or one or several paths, globs or
            directories of text, .jsonl and .parquet files.
        text_field: the column of .jsonl, .parquet and hub records that holds the text.
        separator: in text files, the string between documents; None: a file is a document.
        subset, split: of a hub dataset.

    Raises:
        UserError: nothing there, nothing in it, no network for a hub name, or shards that are
            damaged or not finished.
    """
    if names == "stdlib":
        return FileCorpus(standard_library(), text_field=text_field, separator=separator)
    if isinstance(names, str) and names.startswith(HUB):
        return HubCorpus(names[len(HUB) :], subset=subset, split=split, text_field=text_field)
    patterns = [names] if isinstance(names, str) else names
    if any((Path(name) / "shards_job.json").is_file() for name in patterns):
        from osdn.data.shards import open_shards

        if len(patterns) > 1:
            raise UserError("data.corpus: a directory of shards cannot be one of several corpora")
        return open_shards(Path(patterns[0]))
    return FileCorpus(expand(patterns), text_field=text_field, separator=separator)


def standard_library() -> list[Path]:
    """The standard library's .py files, sorted.

    Without site-packages and dist-packages, which are not the library; and without its tests,
    which some distributions do not install and which hold files that are deliberately not UTF-8.
    """
    root = Path(get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    files = (p for p in root.rglob("*.py") if left_out.isdisjoint(p.relative_to(root).parts))
    found = sorted(files)
    if not found:
        raise UserError(
            f"data.corpus: the Python standard library has no source in {root} on this machine; "
            "name text files of your own (data.corpus='texts/*.txt')"
        )
    return found


def expand(patterns: Sequence[str]) -> list[Path]:
    """The files that paths, globs (** included) and directories name, sorted, each once."""
    files: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern).expanduser()
        inside = escape(str(path)) if path.exists() else str(path)
        inside += "/**/*" if path.is_dir() else ""
        found = {Path(name) for name in glob(inside, recursive=True) if Path(name).is_file()}
        if not found:
            raise UserError(
                f"data.corpus: no file matches {pattern!r} (seen from {Path.cwd()}); give a path, "
                f"a glob or a directory of text, .jsonl or .parquet files, 'stdlib', or "
                f"'{HUB}NAME' for a Hugging Face dataset"
            )
        files |= found
    return sorted(files)


class FileCorpus:
    """Documents of local files.

    A position is [file number in this order, offset, key or None, documents of the group read].
    """

    def __init__(self, files: list[Path], *, text_field: str, separator: str | None) -> None:
        sizes = [path.stat().st_size for path in files]
        if not any(sizes):
            more = f" and {len(files) - 1} more" if len(files) > 1 else ""
            raise UserError(f"data.corpus: {files[0]}{more}: empty; give files that hold text")
        self.files, self.text_field, self.separator = files, text_field, separator
        self.sizes = sizes
        self.size: int | None = sum(sizes)
        names = [str(path) for path in files]
        listing = repr([names, sizes, text_field, separator]).encode()
        self.fingerprint = blake2b(listing, digest_size=16).hexdigest()

    def read(
        self, *, order: str | None = None, position: Any = None, share: Share = WHOLE
    ) -> Iterator[tuple[Document, Any]]:
        files = list(self.files)
        if order is not None:
            Random(order).shuffle(files)
        groups, group, every, mine = share.among(len(files))
        files = files[group::groups]
        first, offset, key, count = position or (0, 0, None, 0)
        for number, path in enumerate(files[first:], start=first):
            for text, where, after, goes_on in self._pieces(path, offset):
                own = Document(text, content_key(text, f"{path}, {where}"))
                document = own if key is None else Document(text, key)
                key = document.key if goes_on else None
                if text:
                    count += 1
                    if (count - 1) % every == mine:
                        yield document, [number, after, key, count]
            offset, key = 0, None

    def done(self, position: Any) -> int:
        """How many of the `size` bytes of the sorted files are behind a position.

        A Parquet file counts when it is left, since its offsets are rows.
        """
        number, offset, *_ = position
        return sum(self.sizes[:number]) + (
            0 if self.files[number].suffix.lower() == ".parquet" else offset
        )

    def _pieces(self, path: Path, offset: int) -> Found:
        """The file's pieces behind an offset, however often it must be opened again."""
        reader = READERS.get(path.suffix.lower())

        def read() -> Found:
            nonlocal offset
            found = (
                read_text(path, offset, self.separator)
                if reader is None
                else reader(path, offset, self.text_field)
            )
            for piece in found:
                offset = piece[2]
                yield piece

        return persevere(read, lambda: str(path))


class HubCorpus:
    """A streamed Hugging Face dataset, file by file.

    A position is [file number in this order, records of it read, records with text of the group].
    datasets' own state is not used: an iteration leaves it behind in the dataset for the next, and
    its resumption has skipped or repeated records (its issues 8145, 8308); it reads the file under
    way again from its start, as this does.
    """

    def __init__(self, name: str, *, subset: str | None, split: str, text_field: str) -> None:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise UserError(
                f"data.corpus: '{HUB}{name}' needs the datasets package: pip install 'osdn[data]'"
            ) from error
        if not Path(name).is_dir() and not hub_is_reachable():
            raise UserError(
                f"data.corpus: no network to stream '{HUB}{name}' from the Hugging Face Hub; "
                "connect, or name local files or 'stdlib'"
            )
        try:
            self.dataset = load_dataset(name, subset, split=split, streaming=True)
        except (OSError, ValueError, RuntimeError) as error:  # its errors derive from these
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"data.corpus: cannot open '{HUB}{name}': {reason}") from error
        self.name, self.text_field = name, text_field
        self.size: int | None = None
        self.fingerprint = repr([name, subset, split, text_field, self.dataset.num_shards])

    def read(
        self, *, order: str | None = None, position: Any = None, share: Share = WHOLE
    ) -> Iterator[tuple[Document, Any]]:
        files = list(range(self.dataset.num_shards))
        if order is not None:
            Random(order).shuffle(files)
        groups, group, every, mine = share.among(len(files))
        files = files[group::groups]
        first, done, count = position or (0, 0, 0)
        for number, file in enumerate(files[first:], start=first):
            for record, after in self._records(file, done):
                text = record.get(self.text_field, 0)
                text = "" if text is None else text
                if not isinstance(text, str):
                    raise UserError(
                        f"data.text_field: the records of '{HUB}{self.name}' have no text in "
                        f"{self.text_field!r}; they have {', '.join(record)}"
                    )
                if text:
                    count += 1
                    if (count - 1) % every == mine:
                        key = content_key(text, f"{self._file(file)}, record {after - 1}")
                        yield Document(text, key), [number, after, count]
            done = 0

    def _file(self, file: int) -> str:
        return f"'{HUB}{self.name}', file {file} (from 0)"

    def _records(self, file: int, done: int) -> Iterator[tuple[dict, int]]:
        """The records of a file behind the first `done`, however often it must be opened again."""

        def read() -> Iterator[tuple[dict, int]]:
            nonlocal done
            records = iter(self.dataset.shard(self.dataset.num_shards, file))
            for record in islice(records, done, None):
                done += 1
                yield record, done

        return persevere(read, lambda: self._file(file))

    def done(self, position: Any) -> int:
        """Records with text that are behind a position."""
        return int(position[2])


def content_key(text: str, where: str) -> int:
    """64 bits of a hash of the text: equal texts have equal keys, in every corpus and order."""
    try:
        data = text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise UserError(
            f"data.corpus: {where}: not Unicode text: a lone surrogate at character {error.start}"
        ) from error
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")
