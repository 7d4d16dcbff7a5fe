"""Corpora and shards from outside: links in circles, endless documents, forged manifests."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from osdn.cli.main import main
from osdn.data import byte_tokenizer, open_corpus, readers
from osdn.data.shards import open_shards
from osdn.errors import UserError
from osdn.system import retry
from osdn.system.files import sha256
from tests.data.test_rows import deal, ranks
from tests.data.test_shards import source


def texts_of(name, **options):
    return [document.text for document, _ in open_corpus(name, **options).read()]


def test_links_in_circles_are_followed_once(tmp_path):
    """Two links to a directory above are 2 ** 40 paths for a reader that follows them all."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "text.txt").write_text("one")
    (tmp_path / "top.txt").write_text("two")
    (inner / "up").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "a")
    (tmp_path / "top2.txt").symlink_to(tmp_path / "top.txt")
    (tmp_path / "self").symlink_to("self")
    (tmp_path / ".hidden.txt").write_text("no")
    for name in (str(tmp_path), f"{tmp_path}/**", f"{tmp_path}/**/*.txt", [str(tmp_path)] * 2):
        assert sorted(texts_of(name)) == ["one", "two"], name
    assert texts_of(f"{tmp_path}/a/**/b/*.txt") == ["one"]


LONG = "".join(f"größer {i}\n" for i in range(400)) + "x" * 3000 + "日本語" * 500


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_a_long_record_comes_in_pieces_and_resumes_within(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PIECE", 1000)
    whole = ["short", LONG, "", LONG[:1000], "last"]
    if kind == "parquet":
        pq.write_table(pa.table({"text": whole}), tmp_path / "a.parquet", row_group_size=2)
    else:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in whole)
        (tmp_path / "a.jsonl").write_text(lines)
    corpus = open_corpus(f"hf:{tmp_path}" if kind == "hub" else str(tmp_path))
    read = list(corpus.read())
    assert "".join(document.text for document, _ in read) == "".join(whole)
    assert max(len(document.text) for document, _ in read) == 1000
    assert len({document.key for document, _ in read[1:-2]}) == 1  # one side of the split
    for cut, (_, position) in enumerate(read):
        again = json.loads(json.dumps(position))  # as a checkpoint has it
        assert list(corpus.read(position=again)) == read[cut + 1 :], cut
    if corpus.size is not None:
        assert all(0 <= corpus.done(position) <= corpus.size for _, position in read)


def test_a_damaged_parquet_file_is_not_read_again_and_again(tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "time", None)  # it must not wait
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["some text"] * 50}), path)
    whole = path.read_bytes()
    for at in range(4, len(whole), 7):
        path.write_bytes(whole[:at] + b"\xff" * 8 + whole[at + 8 :])
        try:
            texts_of(str(path))
        except UserError as error:
            assert "\n" not in str(error)


def test_a_line_that_no_memory_should_hold_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + json.dumps({"text": "x" * 2000}) + "\n")
    with pytest.raises(UserError, match=rf"{path}, byte 14: expected a line of at most 1,000"):
        texts_of(str(path))
    table = tmp_path / "a.parquet"
    texts = [os.urandom(1000).hex(), os.urandom(1000).hex()]
    pq.write_table(pa.table({"text": texts}), table)
    with pytest.raises(UserError, match=rf"{table}, row 0: expected rows of at most 1,000 bytes"):
        texts_of(str(table))


PEAK = """
import resource, sys
import osdn.cli.tokenize
from osdn.cli.main import main
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert main(sys.argv[1:]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss in KiB")
def test_memory_does_not_grow_with_a_long_record_as_a_tokenizer_would(tmp_path):
    """3 MB in one record: tokenized whole it took 200 times that, 600 MB."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "größer 12 " * 270_000}) + "\n")
    line = ["tokenize", str(path), "--tokenizer", "byte", "--processes", "1"]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *line, "--out", str(tmp_path / "out")],
        capture_output=True, text=True,
    )  # fmt: skip
    grown = int(done.stdout.splitlines()[-1]) * 1024
    assert done.returncode == 0 and grown < 250e6, done.stderr


@pytest.fixture
def shards(tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"größer {i}" * 9}) + "\n" for i in range(60)))
    assert tokenize(text, tmp_path / "out") == 0
    return tmp_path / "out"


def tokenize(text, out):
    options = ["--out", str(out), "--shard-tokens", "2000", "--processes", "1"]
    return main(["tokenize", str(text), "--tokenizer", "byte", *options])


FORGED = {
    "a name outside": (("shards", 0, "name"), "../outside"),
    "an absolute name": (("shards", 0, "name"), "/etc/passwd"),
    "a dtype": (("dtype",), "<f2"),
    "an object dtype": (("dtype",), "O"),
    "counts below 0": (("shards", 0, "tokens"), -2),
    "counts of text": (("shards", 0, "documents"), "3"),
    "huge counts": (("shards", 0, "tokens"), 10**30),
    "digests": (("shards", 0, "sha256"), "ab"),
    "no shards": (("shards",), []),
    "no tokenizer": (("tokenizer",), None),
    "another kind": (("kind",), "osdn-shards-0"),
    "a kind of numbers": (("kind",), 1),
}


@pytest.mark.parametrize(("path", "value"), FORGED.values(), ids=FORGED)
def test_a_forged_manifest_is_one_line(path, value, shards):
    manifest = json.loads((shards / "manifest.json").read_text())
    inner = manifest
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    (shards / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError) as caught:
        open_shards(shards)
    assert str(caught.value).startswith("data.corpus: ") and "\n" not in str(caught.value)


def test_damage_that_keeps_a_shards_size_is_found_before_the_embedding(shards, capsys):
    (path,) = shards.glob("shard_00000.tokens")
    tokens = np.fromfile(path, "<u2")
    tokens[7] = 60_000
    tokens.tofile(path)
    made = replace(source(shards), lanes=1)
    with pytest.raises(UserError, match=r"shard_00000\.tokens has the token 60,000, and the token"):
        deal(ranks(made, 1), 400)  # more than an epoch
    assert main(["tokenize", "--check", str(shards)]) == 1
    assert "its SHA-256 is not the manifest's" in capsys.readouterr().err


def test_an_index_of_documents_without_tokens_is_refused(shards):
    (path,) = shards.glob("shard_00000.index")
    index = np.fromfile(path, open_shards(shards).open(open_shards(shards).shards[0])[1].dtype)
    index["tokens"][1] += index["tokens"][0]
    index["tokens"][0] = 0
    index.tofile(path)
    corpus = open_shards(shards)
    with pytest.raises(UserError, match="has a document without tokens"):
        corpus.open(corpus.shards[0])


def test_two_tokenize_at_once_are_one_and_a_line(shards, tmp_path, capsys, monkeypatch):
    """The second comes while the first writes its second file."""
    text, out, told = tmp_path / "text.jsonl", tmp_path / "both", []
    original = os.replace

    def second(*names):
        original(*names)
        if len(told) < 1:
            told.append(tokenize(text, out))

    monkeypatch.setattr(os, "replace", second)
    assert tokenize(text, out) == 0 and told == [1]
    assert "another osdn tokenize writes there; wait" in capsys.readouterr().err
    for path in shards.glob("shard_*"):
        assert sha256(path) == sha256(out / path.name)


def test_the_byte_tokenizers_largest_token_is_known(shards):
    corpus = open_shards(shards)
    corpus.check_tokenizer(byte_tokenizer())
    assert corpus.vocabulary == 258
