"""Where documents come from: files, a streamed dataset, shards, or Python's own library."""

from collections.abc import Sequence
from pathlib import Path
from sysconfig import get_path

from osdn.data.documents import Corpus
from osdn.data.file_corpus import FileCorpus, expand
from osdn.data.hub_corpus import HUB, HubCorpus
from osdn.data.shards import JOB, open_shards
from osdn.errors import UserError


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
    # By the job's file and not the manifest: an unfinished directory must be told as such.
    if any((Path(name) / JOB).is_file() for name in patterns):
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
