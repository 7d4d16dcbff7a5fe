"""Corpora: every reader goes on exactly where it stopped, and says where the text is wrong."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osdn.data import open_corpus, readers
from osdn.data.corpora import standard_library
from osdn.data.documents import content_key
from osdn.data.files import local_file
from osdn.errors import UserError

TEXTS = [f"Dokument {i}: größer, 日本語\n" * (i % 7 + 1) for i in range(300)]


def write(directory: Path, kind: str) -> tuple[str, dict]:
    """TEXTS as two files of one kind; returns the corpus' name and its options."""
    for part, texts in enumerate((TEXTS[:170], TEXTS[170:])):
        path = directory / f"part{part}.{kind}"
        if kind == "parquet":
            pq.write_table(
                pa.table({"body": texts, "n": range(len(texts))}), path, row_group_size=60
            )
        elif kind == "jsonl":
            path.write_text(
                "".join(json.dumps({"body": t}) + "\n" for t in texts), encoding="utf-8"
            )
        else:
            path.write_text("\n---\n".join(texts), encoding="utf-8")
    options = {"separator": "\n---\n"} if kind == "txt" else {"text_field": "body"}
    return str(directory / f"*.{kind}"), options


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_reads_every_document_and_resumes_anywhere(kind, tmp_path):
    name, options = write(tmp_path, kind)
    corpus = open_corpus(name, **options)
    whole = list(corpus.read())
    assert [d.text for d, _ in whole] == TEXTS
    shuffled = list(corpus.read(order="a"))
    for cut in (0, 1, 100, 128, 129, 169, 170, 171, 298):
        for order, read in ((None, whole), ("a", shuffled)):
            rest = list(corpus.read(order=order, position=read[cut][1]))
            assert rest == read[cut + 1 :]


def test_file_order_is_permuted_by_the_order_alone(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text(f"text {i}")
    corpus = open_corpus(str(tmp_path))

    def texts(order):
        return [d.text for d, _ in corpus.read(order=order)]

    assert texts("a") == texts("a") != texts("b")
    assert sorted(texts("a")) == sorted(texts(None))


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="aé日\n|", max_size=400), st.sampled_from([None, "|", "\n|"]))
def test_pieces_lose_nothing(tmp_path_factory, text, separator):
    path = tmp_path_factory.mktemp("pieces") / "a.txt"
    path.write_bytes(text.encode())
    before = readers.PIECE
    readers.PIECE = 16
    try:
        found = list(readers.read_text(local_file(path), 0, separator))
        joined = "".join(t + ("" if goes_on else separator or "") for t, _, _, goes_on in found)
        ending = (separator or "") if not text.endswith(separator or "\0") else ""
        assert joined == (text + ending if text else "")
        assert all(len(t.encode()) <= 16 for t, _, _, goes_on in found if goes_on)
        for i, (_, _, after, _) in enumerate(found):
            assert list(readers.read_text(local_file(path), after, separator)) == found[i + 1 :]
    finally:
        readers.PIECE = before


def test_pieces_of_a_document_stay_on_one_side(tmp_path):
    (tmp_path / "long.txt").write_text("line of text\n" * 60_000)
    corpus = open_corpus(str(tmp_path / "long.txt"))
    read = list(corpus.read())
    assert len(read) >= 3 and len({d.key for d, _ in read}) == 1
    assert all(d.text.endswith("\n") and len(d.text) <= readers.PIECE for d, _ in read)
    resumed = list(corpus.read(position=read[0][1]))
    assert [d.key for d, _ in resumed] == [d.key for d, _ in read[1:]]


def test_standard_library_is_source_without_tests_or_installed_packages():
    found = standard_library()
    names = {p.name for p in found}
    assert {"argparse.py", "ast.py", "random.py"} <= names
    assert not any({"site-packages", "test", "tests"} & set(p.parts[-4:]) for p in found)
    assert found == sorted(found)
    size = sum(len(d.text) for d, _ in open_corpus("stdlib").read())
    assert size > 5_000_000


def test_hub_dataset_streams_and_resumes(tmp_path):
    write(tmp_path, "parquet")  # a local directory goes through the same library as a hub name
    corpus = open_corpus(f"hf:{tmp_path}", text_field="body")
    whole = list(corpus.read())
    assert [d.text for d, _ in whole] == TEXTS
    for cut in (0, 59, 60, 61, 169, 200):
        resumed = list(corpus.read(position=whole[cut][1]))
        assert [d for d, _ in resumed] == [d for d, _ in whole[cut + 1 :]]
        again = list(corpus.read(position=resumed[30][1]))  # from a place that a resumed one gave
        assert [d for d, _ in again] == [d for d, _ in whole[cut + 32 :]]
    begun = corpus.read()
    next(begun)
    assert list(corpus.read()) == whole and list(begun) == whole[1:]  # readings are apart
    shuffled = list(corpus.read(order="a"))
    assert sorted(d.text for d, _ in shuffled) == sorted(TEXTS)
    assert list(corpus.read(order="a", position=shuffled[140][1])) == shuffled[141:]


def test_a_null_in_a_hub_dataset_is_an_empty_text_and_other_files_another_corpus(tmp_path):
    lines = [json.dumps({"text": text}) for text in ("a", None, "b")]
    (tmp_path / "train-0.jsonl").write_text("\n".join(lines))
    corpus = open_corpus(f"hf:{tmp_path}")
    assert [d.text for d, _ in corpus.read()] == ["a", "b"]
    (tmp_path / "train-1.jsonl").write_text(lines[0])
    assert open_corpus(f"hf:{tmp_path}").fingerprint != corpus.fingerprint


def test_names_that_a_glob_would_read_otherwise(tmp_path):
    for name in ("a [2024]", "a*"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "b[1].txt").write_text(name)
        for path in (tmp_path / name, tmp_path / name / "b[1].txt"):
            assert [d.text for d, _ in open_corpus(str(path)).read()] == [name]


@pytest.mark.slow
def test_a_process_that_stops_within_a_hub_stream_ends_cleanly(tmp_path):
    write(tmp_path, "parquet")
    code = (
        "from osdn.data import open_corpus\n"
        f"stream = open_corpus('hf:{tmp_path}', text_field='body').read()\n"
        "print(next(stream)[0].text)\n"
        "stream.close()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == TEXTS[0].strip(), done.stderr


def error(*args, **options) -> str:
    with pytest.raises(UserError) as caught:
        list(open_corpus(*args, **options).read())
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_errors_name_what_is_wrong(tmp_path, monkeypatch):
    bad = tmp_path / "latin.txt"
    bad.write_bytes("fünf\n".encode() * 50_000 + "größer".encode("latin-1"))
    assert f"{bad} is not UTF-8 at byte {50_000 * 6 + 2} (0xf6)" in error(str(bad))
    packed = tmp_path / "texts.jsonl"
    packed.write_bytes(gzip.compress(b'{"text": "ok"}\n'))
    assert f"{packed} is compressed; end its name in .gz" in error(str(packed))
    lines = tmp_path / "bad.jsonl"
    lines.write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n')
    assert f"{lines} is not UTF-8 at byte 25" in error(str(lines))
    lines.write_bytes(b'{"text": "ok"}\n{"text": \n')
    assert f"{lines}, byte 15: not JSON" in error(str(lines))
    for line in (b"[" * 100_000, b"1" * 5000):
        lines.write_bytes(b'{"text": "ok"}\n' + line)
        assert f"{lines}, byte 15: not JSON" in error(str(lines))
    lines.write_bytes(b'{"text": "\\ud800"}\n')
    assert "unexpected end of hex escape" in error(str(lines))
    lines.write_bytes(b'{"title": "a", "body": "b"}\n')
    assert "expected text in 'text', found only title, body" in error(str(lines))
    lines.write_bytes(b'{"text": 3}\n')
    assert "found int there" in error(str(lines))
    table = tmp_path / "t.parquet"
    pq.write_table(pa.table({"content": ["a"]}), table)
    assert "found only content" in error(str(table))
    table.write_bytes(b"PAR1 not really PAR1")
    assert f"{table}: damaged Parquet" in error(str(table))
    (tmp_path / "empty.txt").touch()
    assert f"{tmp_path / 'empty.txt'}: empty" in error(str(tmp_path / "empty.txt"))
    assert "no file matches 'nowhere/*.txt'" in error("nowhere/*.txt")
    monkeypatch.setattr("osdn.data.hub_corpus.hub_is_reachable", lambda: False)
    assert "no network to stream 'hf:someone/something'" in error("hf:someone/something")


def test_equal_texts_have_equal_keys():
    assert content_key("a", "") == content_key("a", "") != content_key("b", "")
