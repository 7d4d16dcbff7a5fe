"""A source that fails every tenth read loses nothing and changes no row."""

import errno
import io
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.packaged_modules.parquet.parquet import Parquet

from osdn.data import RowSource, byte_tokenizer, open_corpus
from osdn.errors import UserError
from osdn.system import retry
from tests.data.test_rows import deal, ranks

TEXTS = [f"Dokument {i}: größer, 日本語\n" * (i % 7 + 1) for i in range(400)]


class Failing:
    """Counts reads and fails every tenth (or every one), until `restore` is called."""

    def __init__(self, monkeypatch, kind):
        self.reads = self.failures = 0
        self.every = 10
        original = getattr(self, kind)()
        monkeypatch.setattr(*original)

    def read(self):
        self.reads += 1
        if self.reads % self.every == 0:
            self.failures += 1
            raise OSError(errno.EIO, "Input/output error")

    def file(self):
        """Path.open gives files that fail."""
        outer, opened = self, Path.open

        class File(io.BufferedReader):
            def read(self, *size):
                outer.read()
                return super().read(*size)

            def readline(self, *size):
                outer.read()
                return super().readline(*size)

            def __next__(self):
                outer.read()
                return super().__next__()

        def fail(path, mode="r", *args):
            return File(opened(path, "rb", 0)) if mode == "rb" else opened(path, mode, *args)

        return Path, "open", fail

    def parquet(self):
        outer, batches = self, pq.ParquetFile.iter_batches

        def fail(*args, **options):
            for batch in batches(*args, **options):
                outer.read()
                yield batch

        return pq.ParquetFile, "iter_batches", fail

    def hub(self):
        """A file that must be opened again is read again from its start: 4 tables at most."""
        outer, tables = self, Parquet._generate_tables

        def fail(*args, **options):
            for table in tables(*args, **options):
                outer.read()
                yield table

        return Parquet, "_generate_tables", fail


def write(directory, kind):
    for part in range(4):
        texts = TEXTS[100 * part : 100 * part + 100]
        if kind == "file":
            (directory / f"{part}.txt").write_text("|".join(texts), encoding="utf-8")
        elif kind == "jsonl":
            lines = (f'{{"text": "{text.strip()}"}}\n'.replace("\n", " ") + "\n" for text in texts)
            (directory / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
        else:
            path = directory / f"{part}.parquet"
            pq.write_table(pa.table({"text": texts}), path, row_group_size=25)
    return f"hf:{directory}" if kind == "hub" else str(directory)


@pytest.mark.parametrize("lanes", [1, 8])
@pytest.mark.parametrize("kind", ["file", "jsonl", "parquet", "hub"])
def test_every_tenth_read_fails_and_no_row_changes(kind, lanes, tmp_path, monkeypatch, capsys):
    name = write(tmp_path, kind)
    monkeypatch.setattr("osdn.data.readers.PIECE", 256)  # so that a text file is many reads
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.0)

    def rows():
        source = RowSource(
            corpus=open_corpus(name, separator="|" if kind == "file" else None),
            tokenizer=byte_tokenizer(), length=64, fraction=0.1, shuffle_bytes=5000, seed=0,
            lanes=lanes,
        )  # fmt: skip
        return ranks(source, 2)

    expected = deal(rows(), 800)  # more than an epoch
    failing = Failing(monkeypatch, "file" if kind == "jsonl" else kind)
    assert deal(rows(), 800) == expected
    assert failing.failures >= (2 if kind in ("parquet", "hub") else 40)
    assert "Input/output error; try 2 of 6" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "names"), [("file", "1.txt"), ("hub", "', file 0 (from 0)")])
def test_a_source_that_stays_away_is_named(kind, names, tmp_path, monkeypatch, capsys):
    name = write(tmp_path, kind)
    waits = []
    monkeypatch.setattr(retry, "time", SimpleNamespace(sleep=waits.append))
    failing = Failing(monkeypatch, kind)
    stream = open_corpus(name).read()
    next(stream)
    failing.every = 1
    with pytest.raises(UserError, match=r"Input/output error, 6 times in a row") as caught:
        list(stream)
    assert names in str(caught.value) and "\n" not in str(caught.value)
    assert waits == [1, 2, 4, 8, 16]
    assert len(capsys.readouterr().err.splitlines()) == 5


def test_a_file_that_is_gone_is_an_error_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "time", None)  # it must not wait
    corpus = open_corpus(write(tmp_path, "file"))
    (tmp_path / "1.txt").unlink()
    with pytest.raises(UserError, match=r"cannot read .*1\.txt: No such file"):
        list(corpus.read())
