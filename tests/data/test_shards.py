"""Shards: the text's own documents, whatever interrupts their making, read in any share."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from osdn.cli.main import main
from osdn.data import (
    RowSource,
    byte_tokenizer,
    encode_document,
    open_corpus,
    validation_rows,
)
from osdn.data.shards import open_shards
from osdn.data.token_corpus import held_out_keys
from osdn.errors import UserError
from tests.data.test_rows import deal, ranks
from tests.train.tiny import HANG


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A directory of 8 JSONL files of 40 texts each, 1,000 characters on the average."""
    directory = tmp_path_factory.mktemp("texts")
    random = Random(0)
    for i in range(8):
        lines = ("größer日 ab" * random.randint(1, 200) + f" {i}.{j}" for j in range(40))
        content = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        (directory / f"{i}.jsonl").write_text(content)
    return directory


def tokenize(texts, out, *options):
    line = ["tokenize", str(texts), "--tokenizer", "byte", "--out", str(out)]
    return main([*line, "--shard-tokens", "20000", *options])


@pytest.fixture(scope="module")
def shards(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "made"
    assert tokenize(texts, out, "--processes", "2") == 0
    return out


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def source(corpus, **changes):
    options = {"length": 64, "fraction": 0.1, "shuffle_bytes": 10**5, "seed": 0, **changes}
    return RowSource(corpus=open_corpus(str(corpus)), tokenizer=byte_tokenizer(), **options)


def test_shards_hold_the_texts_documents_in_order(texts, shards):
    corpus, tokenizer = open_shards(shards), byte_tokenizer()
    assert len(corpus.shards) > 10 and corpus.dtype == np.dtype("<u2")
    made = []
    for shard in corpus.shards:
        tokens, index = corpus.open(shard)
        edges = np.cumsum([0, *index["tokens"]])
        for i, entry in enumerate(index):
            made.append((tokens[edges[i] : edges[i + 1]].tolist(), entry["key"], entry["bytes"]))
        assert tokens.size >= 20000 or shard is corpus.shards[-1]
    documents = [document for document, _ in open_corpus(str(texts)).read()]
    assert made == [
        (encode_document(tokenizer, d.text), d.key, len(d.text.encode())) for d in documents
    ]
    assert corpus.manifest.bytes == sum(len(d.text.encode()) for d in documents)


@pytest.mark.slow
def test_neither_processes_nor_interruptions_change_a_byte(texts, shards, tmp_path, monkeypatch):
    assert tokenize(texts, tmp_path / "alone", "--processes", "1") == 0
    assert contents(tmp_path / "alone") == contents(shards)
    calls, original = [0], os.replace

    def stop(*names):
        calls[0] += 1
        if calls[0] % 5 == 0:
            raise KeyboardInterrupt
        original(*names)

    monkeypatch.setattr(os, "replace", stop)
    interruptions = 0
    while tokenize(texts, tmp_path / "stopped", "--processes", "1") == 130:
        interruptions += 1
    assert interruptions > 8
    assert contents(tmp_path / "stopped") == contents(shards)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_kill_9_keeps_finished_shards_and_leaves_nobody(texts, shards, tmp_path):
    line = [sys.executable, "-m", "osdn", "tokenize", str(texts), "--tokenizer", "byte"]
    line += ["--out", str(tmp_path / "out"), "--processes", "2", "--shard-tokens", "20000"]
    child = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not list((tmp_path / "out").glob("shard_*.json")):
        time.sleep(0.002)
    child.kill()
    child.communicate(timeout=HANG)  # ends when the last process that has its stderr has ended
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard_*.json")}
    (tmp_path / "out" / ".writing-shard_00099.tokens").write_text("half")
    assert tokenize(texts, tmp_path / "out", "--processes", "1") == 0
    assert contents(tmp_path / "out") == contents(shards)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_a_full_disk_keeps_what_is_finished(texts, shards, tmp_path, monkeypatch, capsys):
    original, calls = os.fsync, [0]

    def full(number):
        calls[0] += 1
        if calls[0] == 14:
            raise OSError(28, "No space left on device")
        original(number)

    monkeypatch.setattr(os, "fsync", full)
    assert tokenize(texts, tmp_path / "out", "--processes", "1") == 1
    assert "No space left on device; the finished shards are kept" in capsys.readouterr().err
    assert tokenize(texts, tmp_path / "out", "--processes", "1") == 0
    assert contents(tmp_path / "out") == contents(shards)


def test_a_disk_full_from_the_start_leaves_nothing_in_the_way(texts, tmp_path, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert tokenize(texts, tmp_path / "out", "--processes", "1") == 1
    monkeypatch.undo()
    assert tokenize(texts, tmp_path / "out", "--processes", "1") == 0


def test_damage_is_named_and_mended(texts, shards, tmp_path, capsys):
    assert tokenize(texts, tmp_path, "--processes", "1") == 0
    assert main(["tokenize", "--check", str(tmp_path)]) == 0
    victim = tmp_path / "shard_00003.tokens"
    data = bytearray(victim.read_bytes())
    data[1000] ^= 1
    victim.write_bytes(data)
    open_shards(tmp_path)
    assert main(["tokenize", "--check", str(tmp_path)]) == 1
    assert f"damaged shard: {victim} its SHA-256" in capsys.readouterr().err
    victim.write_bytes(data[:-2])
    with pytest.raises(UserError, match=rf"damaged shard: {victim} has [\d,]+ bytes, expected"):
        open_corpus(str(tmp_path))
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match="is not finished; give the osdn tokenize command"):
        open_corpus(str(tmp_path))
    assert tokenize(texts, tmp_path, "--processes", "1") == 0  # what the first message says
    assert contents(tmp_path) == contents(shards)


def test_other_jobs_and_tokenizers_are_refused(texts, shards, tmp_path, capsys):
    assert tokenize(texts, shards, "--shard-tokens", "777") == 1
    assert "shard_tokens was 20000, and is 777 now" in capsys.readouterr().err
    (tmp_path / "mine.txt").touch()
    assert tokenize(texts, tmp_path) == 1
    assert "is not empty" in capsys.readouterr().err
    assert tokenize(shards, tmp_path / "again") == 1
    assert "holds tokens already" in capsys.readouterr().err
    assert main(["tokenize", "stdlib"]) == 1
    assert "--tokenizer is needed" in capsys.readouterr().err
    backend = Tokenizer(models.WordLevel({"a": 0, "<e>": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    other = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>", unk_token="?")
    with pytest.raises(UserError, match=r"tokenized with 'byte' \(258 tokens\).*\(3 tokens\)"):
        replace(source(shards), tokenizer=other)
    with pytest.raises(UserError, match="shards cannot be one of several files"):
        open_corpus([str(shards), str(tmp_path)])
    with pytest.raises(UserError, match="text is needed here"):
        next(open_corpus(str(shards)).read())


@pytest.mark.parametrize("step", [1, 69_999])  # ids may have holes
def test_a_large_vocabulary_takes_four_bytes(step, tmp_path):
    words = {f"w{i}": i for i in (*range(0, 70_000, step), 1, 7, 65_536)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1").save_pretrained(
        tmp_path / "tokenizer"
    )
    (tmp_path / "a.txt").write_text("w69999 w65536 w7")
    line = ["tokenize", str(tmp_path / "a.txt"), "--tokenizer", str(tmp_path / "tokenizer")]
    assert main([*line, "--processes", "1", "--out", str(tmp_path / "out")]) == 0
    corpus = open_shards(tmp_path / "out")
    assert corpus.dtype.itemsize == 4
    assert corpus.open(corpus.shards[0])[0].tolist() == [1, 69999, 65536, 7, 1]


def test_a_streamed_dataset_makes_the_shards_of_its_files(texts, shards, tmp_path, monkeypatch):
    original, calls = os.replace, [0]

    def stop(*names):
        calls[0] += 1
        if calls[0] in (7, 20):
            raise KeyboardInterrupt
        original(*names)

    monkeypatch.setattr(os, "replace", stop)
    codes = [tokenize(f"hf:{texts}", tmp_path, "--processes", "1") for _ in range(3)]
    assert codes == [130, 130, 0]
    made, expected = contents(tmp_path), contents(shards)
    for name in expected:
        if name.endswith((".tokens", ".index")):
            assert made[name] == expected[name]


@pytest.mark.parametrize("lanes", [1, 4, 32])
def test_an_epoch_is_the_training_documents_once_in_a_seeded_order(lanes, texts, shards):
    expected = sorted(
        encode_document(byte_tokenizer(), d.text)
        for d, _ in open_corpus(str(texts)).read()
        if d.key >= 0.1 * 2**64
    )
    orders = []
    for seed in (0, 0, 1):
        made, found = source(shards, lanes=lanes, seed=seed), []
        for index in range(lanes):
            documents = made.lane(index).documents
            while True:
                document = next(documents)
                if documents.state["epoch"]:
                    break
                found.append(document.tolist())
        assert sorted(found) == expected
        orders.append(found)
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("lanes", [1, 3])
def test_any_number_of_ranks_and_workers_reads_one_order(lanes, shards):
    made = source(shards, lanes=lanes, length=1024)
    alone = ranks(made, 1)
    whole = deal(alone, 624)
    assert alone[0].lane_state(0)["documents"]["epoch"] == 1
    found, states = [], []
    for world in (4, 1, 6, 2):
        rows = ranks(made, world)
        for each in rows:
            if states:
                each.load_state_dict(states)
        found += deal(rows, 156 // world)
        states = [each.state_dict() for each in rows]
        assert len(json.dumps(states)) < 400 * world * lanes
    assert found == whole
    helped = ranks(made, 1, workers=1)
    assert deal(helped, 10) == whole[:10]
    helped[0].close()


def test_validation_is_the_texts_own_documents(texts, shards):
    options = {"length": 10**7, "fraction": 0.1, "limit": 10**9}
    parts = []
    for corpus in (texts, shards):
        rows, size = validation_rows(open_corpus(str(corpus)), byte_tokenizer(), **options)
        count = sum(len(row.tokens) - len(row.starts) for row in rows)
        held = bytes(token for row in rows for token in row.tokens if token < 256)
        parts.append((size, count, sorted(re.findall(rb" \d\.\d+", held))))
    assert parts[0] == parts[1] and parts[0][0] > 10_000
    rows, size = validation_rows(
        open_corpus(str(shards)), byte_tokenizer(), length=64, fraction=0.1, limit=5000
    )
    assert 5000 <= size < 5000 + 4000
    with pytest.raises(UserError, match="no document of"):
        open_shards(shards).held_out(fraction=1e-9, limit=100)


@pytest.mark.parametrize("fraction", [0.0, 1e-9, 0.05, 0.1, 0.5, 1.0])
def test_the_split_is_exact_at_its_edge(fraction):
    edge = int(fraction * 2**64)
    keys = [k for k in (0, 1, edge - 1, edge, edge + 1, 2**64 - 1) if 0 <= k < 2**64]
    held = held_out_keys(np.array(keys, np.uint64), fraction).tolist()
    assert held == [key < fraction * 2**64 for key in keys]
