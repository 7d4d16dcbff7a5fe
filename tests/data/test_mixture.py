"""Mixtures: shares of the tokens, the same rows after any interruption, state checked."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osdn.data import (
    RowSource,
    byte_tokenizer,
    open_corpora,
    open_corpus,
    open_rows,
    validation_rows,
)
from osdn.errors import UserError
from osdn.train import load_recipe
from tests.data.test_megatron import texts
from tests.data.test_megatron import write as write_megatron


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Three corpora whose documents differ in their letters and lengths: A, B (tokens), C."""
    directory = tmp_path_factory.mktemp("corpora")
    for name, count, length in (("a", 40, 30), ("c", 300, 200)):
        (directory / name).mkdir()
        for part in range(3):
            lines = [json.dumps({"text": name.upper() * (length + i % 9)}) for i in range(count)]
            (directory / name / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    write_megatron(directory / "b", texts(500))  # lower-case letters
    return {name: str(directory / name) for name in ("a", "c")} | {"b": str(directory / "b.idx")}


def source(names, lanes=1, **options):
    common = {"length": 50, "fraction": 0.0, "shuffle_bytes": 3000, "seed": 5, "lanes": lanes}
    corpus = open_corpora(names)
    return RowSource(corpus=corpus, tokenizer=byte_tokenizer(), **{**common, **options})


def share(rows, low, high):
    tokens = np.concatenate([row.tokens for row in rows])
    text = tokens[tokens < 256]
    return ((text >= low) & (text <= high)).mean()


@pytest.mark.parametrize("weights", [(1, 1, 2), (5, 0.5, 4.5)])
def test_each_corpus_has_its_share_of_the_tokens_over_many_epochs(corpora, weights):
    names = {corpora[name]: weight for name, weight in zip("abc", weights)}
    rows = open_rows(source(names))
    read = [next(rows) for _ in range(4000)]  # a's 3,900 letters come ten times or more
    for weight, (low, high) in zip(weights, ((65, 65), (97, 122), (67, 67))):
        # Shares are of all tokens; letters alone are fewer where documents are short.
        assert share(read, low, high) == pytest.approx(weight / sum(weights), abs=0.02)


def test_the_order_in_the_mapping_changes_nothing(corpora):
    names = {corpora["a"]: 1.0, corpora["c"]: 3.0}
    one, other = source(names), source(dict(reversed(names.items())))
    assert one.corpus.fingerprint == other.corpus.fingerprint
    rows, again = open_rows(one), open_rows(other)
    assert [next(rows) for _ in range(30)] == [next(again) for _ in range(30)]


@settings(max_examples=25, deadline=None)
@given(
    steps=st.integers(0, 90), worlds=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    lanes=st.integers(1, 3),
)  # fmt: skip
def test_any_number_of_ranks_resumes_bit_for_bit(corpora, steps, worlds, lanes):
    names = {corpora["a"]: 2.0, corpora["b"]: 1.0, corpora["c"]: 1.5}
    before, after = worlds
    whole = open_rows(source(names, lanes))
    order = [next(whole) for _ in range((steps + 20) * before)]
    ranks = [open_rows(source(names, lanes), rank=r, world=before) for r in range(before)]
    for _ in range(steps):
        for rank in ranks:
            next(rank)
    states = json.loads(json.dumps([rank.state_dict() for rank in ranks]))
    resumed = [open_rows(source(names, lanes), rank=r, world=after) for r in range(after)]
    for rank in resumed:
        rank.load_state_dict(states)
    done = steps * before
    found = sorted((rank.next, rank) for rank in resumed)
    assert [number for number, _ in found] == list(range(done, done + after))
    expected = order[done : done + 15]
    assert [next(found[i % after][1]) for i in range(15)] == expected


def test_workers_make_the_rows_of_the_mixture(corpora):
    names = {corpora["a"]: 1.0, corpora["b"]: 1.0}
    own, theirs = open_rows(source(names, 2)), open_rows(source(names, 2), workers=2)
    try:
        assert [next(theirs) for _ in range(30)] == [next(own) for _ in range(30)]
    finally:
        theirs.close()


def test_held_out_text_is_that_of_each_corpus_and_never_trained_on(corpora):
    names = {corpora["b"]: 1.0, corpora["c"]: 1.0}
    rows, size = validation_rows(
        open_corpora(names), byte_tokenizer(), length=64, fraction=0.3, limit=4000
    )
    parts = [
        validation_rows(open_corpus(name), byte_tokenizer(), length=64, fraction=0.3, limit=2000)
        for name in sorted(names)
    ]
    assert (rows, size) == ([*parts[0][0], *parts[1][0]], parts[0][1] + parts[1][1])
    assert share(rows, 67, 67) == pytest.approx(0.5, abs=0.05)
    held = {tuple(row.tokens[:20]) for row in parts[0][0]}
    training = open_rows(source(names, fraction=0.3))
    starts = {tuple(row.tokens[s : s + 20]) for _ in range(2000)
              for row in [next(training)] for s in row.starts}  # fmt: skip
    assert not held & starts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update(parts=state["parts"][:1]), "its corpora or their weights"),
        (lambda state: state.update(fingerprint="x"), "its corpora or their weights changed"),
        (lambda state: state["parts"][0].update(tokens=-1), "parts.0.tokens"),
        (lambda state: state.pop("parts"), "parts: Field required"),
        (lambda state: state["parts"][1].update(documents={}), "Field required"),
    ],
)
def test_a_damaged_or_foreign_state_is_one_line(corpora, change, message):
    names = {corpora["a"]: 1.0, corpora["c"]: 1.0}
    rows = open_rows(source(names))
    next(rows)
    state = rows.state_dict()
    change(state["streams"][0]["lanes"][0]["documents"])
    with pytest.raises(UserError) as caught:
        open_rows(source(names)).load_state_dict([state])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_recipe_names_weights(corpora, tmp_path):
    path = tmp_path / "mixed.yaml"
    path.write_text(f"model: {{}}\ndata:\n  corpus: {{stdlib: 1, '{corpora['a']}': 0.5}}\n")
    assert load_recipe(path).data.corpus == {"stdlib": 1.0, corpora["a"]: 0.5}
    for value, message in (("{stdlib: 0}", "greater than 0"), ("{}", "at least 1"),
                           ("{stdlib: a}", "number"), ("{stdlib: .inf}", "finite")):  # fmt: skip
        with pytest.raises(UserError) as caught:
            load_recipe(path, [f"data.corpus={value}"])
        assert "data.corpus" in str(caught.value), value
        assert message in str(caught.value), value
