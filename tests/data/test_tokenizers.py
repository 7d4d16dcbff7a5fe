"""The byte tokenizer gives back every text, before and after it is saved."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from osdn.data import byte_tokenizer, encode_document, load_tokenizer
from osdn.errors import UserError

FRESH = byte_tokenizer()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    FRESH.save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


@given(st.text())
def test_round_trip(saved, text):
    for tokenizer in (FRESH, saved):
        ids = encode_document(tokenizer, text)
        assert ids == [256, *text.encode(), 256]
        assert tokenizer.decode(ids[1:-1]) == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("text", ["<|endoftext|><|pad|>", " a  b ,. n't", "\r\n\0\ufeff\u2028"])
def test_special_tokens_spelt_out_are_text(saved, text):
    for tokenizer in (FRESH, saved):
        assert encode_document(tokenizer, text)[1:-1] == list(text.encode())
        assert tokenizer.decode(list(text.encode())) == text


def test_special_tokens(saved):
    for tokenizer in (FRESH, saved):
        assert len(tokenizer) == 258
        special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert special == (256, 256, 257)


def test_a_tokenizer_directory_loads_and_a_missing_one_is_one_line(tmp_path, monkeypatch):
    FRESH.save_pretrained(tmp_path / "tokenizer")
    assert encode_document(load_tokenizer(str(tmp_path / "tokenizer")), "ä") == [256, 195, 164, 256]
    monkeypatch.setattr("osdn.data.tokenizers.hub_is_reachable", lambda: False)
    (tmp_path / "nothing").mkdir()
    for name, expected in (
        (str(tmp_path / "nothing"), "holds no tokenizer"),
        ("someone/something", "no network to fetch it"),
    ):
        with pytest.raises(UserError, match=expected) as caught:
            load_tokenizer(name)
        assert "\n" not in str(caught.value)
    silent = byte_tokenizer()
    silent.eos_token = None
    silent.save_pretrained(tmp_path / "silent")
    with pytest.raises(UserError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path / "silent"))
