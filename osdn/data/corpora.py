"""Where documents come from: files, a streamed dataset, shards, Python's library, or a mixture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from sysconfig import get_path
from typing import Any

from osdn.data.documents import Corpus
from osdn.data.file_corpus import FileCorpus
from osdn.data.files import expand, local_file
from osdn.data.hub_corpus import HUB, HubCorpus
from osdn.data.megatron import SUFFIXES, open_megatron
from osdn.data.mixture import Mixture
from osdn.data.shards import JOB, open_shards
from osdn.errors import UserError


def open_corpora(
    names: str | Sequence[str] | Mapping[str, float], **options: Any
) -> Corpus | Mixture:
    """As open_corpus; where a mapping gives each name a weight, a Mixture."""
    if not isinstance(names, Mapping):
        return open_corpus(names, **options)
    return Mixture({name: open_corpus(name, **options) for name in names}, names)


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
            Hugging Face dataset, streamed), a directory of shards that `osdn tokenize` made or
            Megatron's .bin and .idx files (a TokenCorpus; the other options are not for it), or
            one or several paths, URLs, globs or directories of text, .jsonl and .parquet files;
            text and .jsonl may be compressed (.gz, .zst).
        text_field: the column of .jsonl, .parquet and hub records that holds the text.
        separator: in text files, the string between documents; None: a file is a document.
        subset, split: of a hub dataset.

    Raises:
        UserError: nothing there, nothing in it, no network for a hub name, or shards that are
            damaged or not finished.
    """
    if names == "stdlib":
        files = [local_file(path) for path in standard_library()]
        return FileCorpus(files, text_field=text_field, separator=separator)
    if isinstance(names, str) and names.startswith(HUB) and not names.startswith(HUB + "//"):
        return HubCorpus(names[len(HUB) :], subset=subset, split=split, text_field=text_field)
    patterns = [names] if isinstance(names, str) else names
    # By the job's file and not the manifest: an unfinished directory must be told as such.
    if any((Path(name) / JOB).is_file() for name in patterns):
        if len(patterns) > 1:
            raise UserError(
                "data.corpus: a directory of shards cannot be one of several files; a mapping of "
                "names to weights mixes corpora"
            )
        return open_shards(Path(patterns[0]))
    if any(name.endswith(SUFFIXES) for name in patterns):
        return open_megatron(patterns)
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
