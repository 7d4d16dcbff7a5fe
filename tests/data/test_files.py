"""Compressed files and URLs: the documents of plain files, resumed anywhere; damage in a line."""

import gzip
import json

import fsspec
import pyarrow as pa
import pytest

from osdn.data import RowSource, byte_tokenizer, open_corpus, open_rows
from osdn.errors import UserError

TEXTS = [f"Dokument {i}: größer, 日本語\n" * (i % 7 + 1) for i in range(60)]


def compressed(data: bytes, suffix: str) -> bytes:
    """In two members where there is one at all, as `cat a.gz b.gz` and parallel writers make."""
    half = len(data) // 2
    if suffix == ".gz":
        return gzip.compress(data[:half]) + gzip.compress(data[half:])
    if suffix == ".zst":
        return b"".join(pa.compress(d, "zstd", asbytes=True) for d in (data[:half], data[half:]))
    return data


def write(directory, kind, suffix=""):
    """TEXTS in two files; returns the options of their corpus."""
    directory.mkdir(exist_ok=True)
    for part, texts in enumerate((TEXTS[:35], TEXTS[35:])):
        if kind == "jsonl":
            text = "".join(json.dumps({"body": t}) + "\n" for t in texts)
        else:
            text = "\n---\n".join(texts)
        path = directory / f"part{part}.{kind}{suffix}"
        path.write_bytes(compressed(text.encode(), suffix))
    return {"text_field": "body"} if kind == "jsonl" else {"separator": "\n---\n"}


@pytest.fixture
def memory():
    """fsspec's file system in memory, empty before and after."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_compressed_files_hold_the_documents_of_the_plain_ones(kind, suffix, tmp_path):
    options = write(tmp_path / "packed", kind, suffix)
    write(tmp_path / "plain", kind)
    corpus = open_corpus(str(tmp_path / "packed"), **options)
    read = list(corpus.read())
    plain = list(open_corpus(str(tmp_path / "plain"), **options).read())
    assert [document for document, _ in read] == [document for document, _ in plain]
    assert [document.text for document, _ in read] == TEXTS
    for cut in (0, 17, 33, 34, 35, 58):
        assert list(corpus.read(position=read[cut][1])) == read[cut + 1 :]


def test_progress_of_compressed_files_is_their_stored_bytes(tmp_path):
    options = write(tmp_path, "jsonl", ".gz")
    corpus = open_corpus(str(tmp_path), **options)
    first = (tmp_path / "part0.jsonl.gz").stat().st_size
    done = [corpus.done(position) for _, position in corpus.read()]
    assert done == [0] * 35 + [first] * 25
    assert corpus.size == first + (tmp_path / "part1.jsonl.gz").stat().st_size


@pytest.mark.parametrize("name", ["memory://texts/*.jsonl.gz", "memory://texts", "memory://te*"])
def test_urls_are_read_as_local_files_are(name, memory, tmp_path):
    options = write(tmp_path / "texts", "jsonl", ".gz")
    for path in sorted((tmp_path / "texts").iterdir()):
        memory.pipe(f"/texts/{path.name}", path.read_bytes())
    if name.endswith("te*"):
        with pytest.raises(UserError, match="no file matches 'memory://te\\*'"):
            open_corpus(name, **options)
        return
    local, remote = open_corpus(str(tmp_path / "texts"), **options), open_corpus(name, **options)
    read = list(remote.read())
    assert read == list(local.read())
    assert list(remote.read(position=read[40][1])) == read[41:]


def test_parquet_behind_a_url(memory, tmp_path):
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=20)
    memory.pipe("/a.parquet", (tmp_path / "a.parquet").read_bytes())
    read = list(open_corpus("memory://a.parquet").read())
    assert [document.text for document, _ in read] == TEXTS
    rest = open_corpus("memory://a.parquet").read(position=read[29][1])
    assert [document.text for document, _ in rest] == TEXTS[30:]


def test_workers_read_urls(tmp_path):
    """A process of its own opens the file system anew; rows are those of this process."""
    options = write(tmp_path / "texts", "jsonl", ".zst")
    corpus = open_corpus(f"file://{tmp_path}/texts/*.zst", **options)
    source = RowSource(
        corpus=corpus, tokenizer=byte_tokenizer(), length=64, fraction=0.0,
        shuffle_bytes=2000, seed=1, lanes=2,
    )  # fmt: skip
    own, theirs = open_rows(source), open_rows(source, workers=2)
    try:
        assert [next(theirs) for _ in range(40)] == [next(own) for _ in range(40)]
    finally:
        own.close()
        theirs.close()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "other", "middle"])
def test_damage_is_one_line_at_once(suffix, damage, tmp_path, monkeypatch):
    """Not tried again, as a failing disk is."""
    write(tmp_path, "txt", suffix)
    path = tmp_path / f"part1.txt{suffix}"
    data = path.read_bytes()
    if suffix == ".zst" and damage == "middle":
        data = data.replace(b"\x28\xb5\x2f\xfd", b"\0\0\0\0")
    changed = {"cut": data[:-12], "other": b"plain text", "middle": data[:40] + b"\xff" * 40}
    path.write_bytes(changed[damage])
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("tried again"))
    with pytest.raises(UserError) as caught:
        list(open_corpus(str(tmp_path)).read())
    assert f"{path}: damaged {suffix} file: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_network_that_fails_under_a_decoder_is_tried_again(memory, tmp_path, monkeypatch):
    options = write(tmp_path, "jsonl", ".zst")
    for path in sorted(tmp_path.iterdir()):
        memory.pipe(f"/texts/{path.name}", path.read_bytes())
    corpus = open_corpus("memory://texts", **options)
    opened, whole = [], type(memory)._open

    def failing(self, path, *args, **kwargs):
        opened.append(path)
        if len(opened) == 2:
            raise TimeoutError(110, "slow")
        return whole(self, path, *args, **kwargs)

    monkeypatch.setattr(type(memory), "_open", failing)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert [document.text for document, _ in corpus.read()] == TEXTS
    assert len(opened) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nosuch://bucket/a.txt", "cannot open nosuch://bucket/a.txt: Protocol not known: nosuch"),
        ("memory://nothing/*.txt", "no file matches 'memory://nothing/*.txt'"),
        ("memory://nothing", "no file matches 'memory://nothing'"),
    ],
)
def test_urls_that_lead_nowhere(name, message, memory):
    with pytest.raises(UserError) as caught:
        open_corpus(name)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_package_and_a_failing_listing_are_named(memory, monkeypatch):
    def refused(self, *args, **kwargs):
        raise RuntimeError("Unable to locate credentials\nwith many\nlines")

    monkeypatch.setattr(type(memory), "find", refused)
    with pytest.raises(UserError, match=r"^data.corpus: cannot list memory://a: Unable to locate"):
        open_corpus("memory://a")
    monkeypatch.setattr(
        "fsspec.core.url_to_fs", lambda url: (_ for _ in ()).throw(ImportError("Install s3fs"))
    )
    with pytest.raises(UserError, match="cannot open s3://b/c: Install s3fs"):
        open_corpus("s3://b/c")


def test_a_url_of_the_hub_is_no_dataset_name(monkeypatch):
    monkeypatch.setattr("osdn.data.files.hub_is_reachable", lambda: False)
    with pytest.raises(UserError, match="no network to read hf://datasets/a/b/c"):
        open_corpus("hf://datasets/a/b/c.jsonl")


def test_compressed_parquet_is_refused(tmp_path):
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(b"PAR1"))
    with pytest.raises(UserError, match="expected a Parquet file as it is; unpack it"):
        list(open_corpus(str(tmp_path / "a.parquet.gz")).read())
