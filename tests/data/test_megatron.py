"""Megatron's .bin and .idx: the documents that were written, in the rows of a run."""

import struct

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from osdn.data import RowSource, byte_tokenizer, megatron, open_corpus, open_rows, validation_rows
from osdn.errors import UserError

CODES = {"u1": 1, "<i2": 3, "<i4": 4, "<i8": 5, "<u2": 8}


def write(path, documents, dtype="<u2", modes=False):
    """The public format; documents: lists of sequences of tokens."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * np.dtype(dtype).itemsize
    starts = np.cumsum([0, *(len(document) for document in documents)]).astype("<i8")
    header = b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, CODES[dtype])
    header += struct.pack("<QQ", len(lengths), len(starts))
    body = lengths.tobytes() + pointers.astype("<i8").tobytes() + starts.tobytes()
    path.with_suffix(".idx").write_bytes(header + body + bytes(len(lengths) if modes else 0))
    tokens = np.concatenate([np.array(s, dtype) for s in sequences])
    path.with_suffix(".bin").write_bytes(tokens.tobytes())
    return str(path.with_suffix(".idx"))


def source(corpus, **options):
    common = {"length": 32, "fraction": 0.0, "shuffle_bytes": 1, "seed": 3, "lanes": 1}
    return RowSource(corpus=corpus, tokenizer=byte_tokenizer(), **{**common, **options})


def documents_of(corpus):
    """What training reads in one epoch, sorted."""
    corpus.check_tokenizer(byte_tokenizer())
    found = []
    for shard in corpus.shards:
        tokens, index = corpus.open(shard)
        for end, size in zip(np.cumsum(index["tokens"]), index["tokens"]):
            found.append(corpus.document(tokens[end - size : end]).tolist())
    return found


@pytest.mark.parametrize("dtype", list(CODES))
@pytest.mark.parametrize("modes", [False, True])
@settings(max_examples=15, deadline=None)
@given(
    documents=st.lists(
        st.lists(st.lists(st.integers(0, 127), max_size=5), min_size=1, max_size=3),
        min_size=1,
        max_size=12,
    ).filter(lambda documents: any(any(sequences) for sequences in documents)),
    window=st.integers(1, 12),
)
def test_documents_are_those_written(tmp_path_factory, dtype, modes, documents, window):
    """Of several sequences each, some empty; a window without a token is refused."""
    joined = [[token for sequence in d for token in sequence] for d in documents]
    name = write(tmp_path_factory.mktemp("megatron") / "part", documents, dtype, modes)
    before, megatron.DOCUMENTS = megatron.DOCUMENTS, window
    try:
        corpus = open_corpus(name)
        if all(any(joined[i : i + window]) for i in range(0, len(joined), window)):
            assert documents_of(corpus) == [[256, *tokens, 256] for tokens in joined if tokens]
    finally:
        megatron.DOCUMENTS = before


def test_begin_and_end_tokens_that_are_there_are_not_doubled(tmp_path):
    name = write(tmp_path / "a", [[[1, 2, 256]], [[256, 3, 4]], [[256]], [[256, 256]]])
    assert documents_of(open_corpus(name)) == [
        [256, 1, 2, 256], [256, 3, 4, 256], [256, 256], [256, 256],
    ]  # fmt: skip


def texts(n, seed=0):
    rng = np.random.default_rng(seed)
    return [[rng.integers(97, 122, rng.integers(2, 80)).tolist()] for _ in range(n)]


def test_rows_resume_bit_for_bit_and_hold_every_document_once(tmp_path, monkeypatch):
    monkeypatch.setattr(megatron, "DOCUMENTS", 16)  # several shards a file
    names = [write(tmp_path / f"part{i}", texts(50, i)) for i in range(3)]
    corpus = open_corpus(names)
    assert len(corpus.shards) == 12
    whole = source(corpus, lanes=2)
    rows = open_rows(whole)
    first = [next(rows) for _ in range(60)]
    state = rows.state_dict()
    rest = [next(rows) for _ in range(60)]
    again = open_rows(source(open_corpus(names), lanes=2))
    again.load_state_dict([state])
    assert [next(again) for _ in range(60)] == rest
    ranks = [open_rows(whole, rank=r, world=3) for r in range(3)]
    assert [next(ranks[i % 3]) for i in range(60)] == first


def test_copies_stay_on_one_side_and_validation_counts_the_text(tmp_path):
    documents = texts(400)
    name = write(tmp_path / "a", [*documents, *documents[:100]])
    corpus = open_corpus(name)
    corpus.check_tokenizer(byte_tokenizer())
    _, index = corpus.open(corpus.shards[0])
    assert (index["key"][400:] == index["key"][:100]).all()
    assert len(set(index["key"].tolist())) == 400
    rows, size = validation_rows(corpus, byte_tokenizer(), length=64, fraction=0.2, limit=10**9)
    held = [d[0] for d, key in zip([*documents, *documents[:100]], index["key"].tolist())
            if key < 0.2 * 2**64]  # fmt: skip
    assert 60 < len(held) < 140
    assert size == sum(map(len, held))
    targets = sum(len(row.tokens) - len(row.starts) for row in rows)
    assert targets == size + len(held)  # and each document's end


def broken(tmp_path, change):
    """The message for a pair that `change` damaged."""
    name = write(tmp_path / "a", [[[1, 2]], [[3, 4, 5], [6]], [[7]]])
    change(tmp_path / "a.idx", tmp_path / "a.bin")
    with pytest.raises(UserError) as caught:
        documents_of(open_corpus(name))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def patched(at, data):
    def change(index, _):
        content = bytearray(index.read_bytes())
        content[at : at + len(data)] = data
        index.write_bytes(content)

    return change


HEAD, S = 34, 4  # bytes of the header, sequences


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (patched(0, b"X"), "does not begin as a Megatron index does"),
        (patched(9, b"\x02"), "expected version 1 and a type of"),
        (patched(17, b"\x07"), "expected version 1 and a type of"),
        (patched(18, b"\xff" * 8), "expected"),
        (lambda index, _: index.write_bytes(index.read_bytes()[:-1]), "bytes, expected"),
        (lambda index, _: index.write_bytes(b""), "does not begin as a Megatron index does"),
        (patched(HEAD, struct.pack("<i", 3)), "do not lie end to end"),
        (patched(HEAD, struct.pack("<i", -1)), "hold no token"),
        (patched(HEAD + 4 * S, struct.pack("<q", -8)), "do not lie end to end"),
        (patched(HEAD + 4 * S + 8, struct.pack("<q", 2)), "do not lie end to end"),
        (patched(HEAD + 12 * S, struct.pack("<q", 3)), "out of order"),
        (patched(HEAD + 12 * S + 24, struct.pack("<q", 2**40)), "out of order"),
        (lambda _, tokens: tokens.write_bytes(tokens.read_bytes()[:-2]), "fewer than its index"),
        (lambda _, tokens: tokens.write_bytes(b"\x02\x01" * 7), "has the token 258, and the"),
        (lambda _, tokens: tokens.unlink(), "a pair NAME.bin and NAME.idx"),
    ],
)
def test_damage_is_one_line(tmp_path, change, message):
    assert message in broken(tmp_path, change)


@settings(max_examples=300, deadline=None)
@example(at=97, data=b"\x01\x00\x00\x00\x00\x00\x00\x00\x81")  # a difference that wraps around
@given(at=st.integers(0, 33 + 12 * S + 32), data=st.binary(min_size=1, max_size=9))
def test_no_byte_of_the_index_leads_to_a_traceback(tmp_path_factory, at, data):
    directory = tmp_path_factory.mktemp("fuzz")
    name = write(directory / "a", [[[1, 2]], [[3, 4, 5], [6]], [[7]]])
    patched(at, data)(directory / "a.idx", None)
    try:
        documents_of(open_corpus(name))
    except UserError as error:
        assert "\n" not in str(error)


def test_names(tmp_path):
    write(tmp_path / "a", [[[1, 2]]])
    (tmp_path / "b.txt").write_text("text")
    assert len(open_corpus([str(tmp_path / "a.bin"), str(tmp_path / "a.idx")]).files) == 1
    with pytest.raises(UserError, match=r"expected Megatron's \.bin and \.idx files only"):
        open_corpus([str(tmp_path / "a.bin"), str(tmp_path / "b.txt")])
    with pytest.raises(UserError, match="holds tokens, and text is needed here"):
        next(open_corpus(str(tmp_path / "a.bin")).read())
