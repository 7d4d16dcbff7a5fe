"""Packing: every token predicted once, no sequence across documents, exact resumption."""

import math
import tracemalloc
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osdn.data import (
    TrainingDocuments,
    TrainingRows,
    byte_tokenizer,
    collate,
    held_out_texts,
    open_corpus,
    pack,
)
from osdn.errors import UserError

lengths = st.lists(st.integers(2, 40), min_size=1, max_size=20)


@settings(deadline=None)
@given(lengths, st.integers(2, 17), st.integers(1, 3))
def test_every_token_is_predicted_once_from_its_own_document(sizes, length, per_batch):
    documents = [[1000 * i + j for j in range(size)] for i, size in enumerate(sizes)]
    rows = list(pack(iter(documents), length))
    assert all(len(row.tokens) == length for row in rows[:-1])
    predicted = []
    for first in range(0, len(rows), per_batch):
        batch = collate(rows[first : first + per_batch])
        edges = batch.cu_seqlens.tolist()
        assert edges == sorted(set(edges)) and edges[-1] == batch.input_ids.shape[1]
        scored = 0
        for start, end in pairwise(edges):
            tokens = batch.input_ids[0, start:end].tolist()
            assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))  # one run of one text
            assert tokens[0] // 1000 == tokens[-1] // 1000
            labels = batch.labels[0, start:end].tolist()
            assert labels == [-100, *tokens[1:]]
            predicted += tokens[1:]
            scored += len(tokens) - 1
        assert batch.targets == scored
    assert predicted == [token for document in documents for token in document[1:]]


def make_corpus(directory, documents=120):
    for i in range(documents):
        (directory / f"{i:03}.txt").write_text(f"{i} " * (5 + i % 31))
    return open_corpus(str(directory))


def make_rows(corpus, seed=0, shuffle_bytes=1500):
    documents = TrainingDocuments(corpus, fraction=0.2, shuffle_bytes=shuffle_bytes, seed=seed)
    return TrainingRows(documents, byte_tokenizer(), 64)


def test_resumes_at_every_row_for_more_than_an_epoch(tmp_path):
    corpus = make_corpus(tmp_path)
    rows = make_rows(corpus)
    states, expected = [], []
    while rows.documents.state["epoch"] < 2:
        states.append(rows.state_dict())
        expected.append(next(rows))
    assert len(expected) > 150
    for start in range(0, len(expected) - 3, 7):
        fresh = make_rows(corpus)
        fresh.load_state_dict(states[start])
        assert fresh.state_dict() == states[start]
        assert [next(fresh) for _ in range(3)] == expected[start : start + 3]


def texts_of_an_epoch(documents):
    epoch, texts = documents.state["epoch"], []
    while True:
        text = next(documents)
        if documents.state["epoch"] != epoch:
            return texts
        texts.append(text)


def test_an_epoch_is_every_training_document_once_in_a_seeded_order(tmp_path):
    corpus = make_corpus(tmp_path)
    held_out = held_out_texts(corpus, fraction=0.2, limit=10**6)
    everything = {document.text for document, _ in corpus.read()}

    def order(seed, shuffle_bytes):
        return texts_of_an_epoch(
            TrainingDocuments(corpus, fraction=0.2, shuffle_bytes=shuffle_bytes, seed=seed)
        )

    for shuffle_bytes in (1, 1500, 10**6):
        texts = order(0, shuffle_bytes)
        assert set(texts) == everything - set(held_out)
        assert len(texts) == len(set(texts))
        assert texts == order(0, shuffle_bytes) != order(1, shuffle_bytes)


def test_split_is_by_content_and_near_its_fraction(tmp_path):
    corpus = make_corpus(tmp_path)
    held_out = held_out_texts(corpus, fraction=0.2, limit=10**6)
    total = len(list(corpus.read()))
    assert abs(len(held_out) - 0.2 * total) < 4 * math.sqrt(0.2 * 0.8 * total)
    for i, text in enumerate(held_out):  # copies under other names go to the same side
        (tmp_path / f"copy{i}.txt").write_text(text)
    with_copies = open_corpus(str(tmp_path))
    training = texts_of_an_epoch(
        TrainingDocuments(with_copies, fraction=0.2, shuffle_bytes=10**6, seed=0)
    )
    assert not set(training) & set(held_out)


def test_held_out_texts_stop_at_the_limit_between_characters(tmp_path):
    for i in range(50):
        (tmp_path / f"{i}.txt").write_text(f"日本語{i}" * 20)
    corpus = open_corpus(str(tmp_path))
    texts = held_out_texts(corpus, fraction=0.5, limit=1000)
    assert 997 <= sum(len(t.encode()) for t in texts) <= 1000


def test_memory_holds_a_block_and_not_the_corpus(tmp_path):
    line = "one line of a corpus that is larger than the memory it may use\n"
    with (tmp_path / "large.txt").open("w") as file:
        for i in range(4000):
            file.write(f"document {i}\n{line * 100}---\n")
    size = (tmp_path / "large.txt").stat().st_size
    corpus = open_corpus(str(tmp_path / "large.txt"), separator="---\n")
    documents = TrainingDocuments(corpus, fraction=0.1, shuffle_bytes=10**6, seed=0)
    tracemalloc.start()
    count = len([None for _ in zip(range(5000), documents)])  # more than an epoch
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 5000 and documents.state["epoch"] == 1
    assert size > 25e6 and peak < 5e6


def test_nothing_to_train_on_or_to_validate_with_is_one_line(tmp_path):
    (tmp_path / "one.txt").write_text("one document")
    corpus = open_corpus(str(tmp_path))
    with pytest.raises(UserError, match=r"no document falls in the held-out 0\.00%"):
        held_out_texts(corpus, fraction=1e-9, limit=100)
    with pytest.raises(UserError, match="no training document"):
        next(TrainingDocuments(corpus, fraction=1 - 1e-12, shuffle_bytes=100, seed=0))


def test_a_changed_corpus_is_not_resumed(tmp_path):
    rows = make_rows(make_corpus(tmp_path))
    next(rows)
    state = rows.state_dict()
    (tmp_path / "new.txt").write_text("more")
    with pytest.raises(UserError, match="changed"):
        make_rows(open_corpus(str(tmp_path))).load_state_dict(state)


def test_state_is_plain_enough_for_a_safe_load(tmp_path):
    rows = make_rows(make_corpus(tmp_path))
    for _ in range(5):
        next(rows)
    torch.save(rows.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == rows.state_dict()
