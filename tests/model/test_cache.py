"""The cache's methods for batches, and the rollback that it refuses."""

import copy

import pytest
import torch
from transformers import DynamicCache

from osdn.model.cache import OSDNCache
from tests.model.tiny import MIXERS, build, tokens
from tests.numerics import assert_close


def filled(model, ids):
    cache = OSDNCache(model.config)
    model(ids, past_key_values=cache, use_cache=True)
    return cache


def goes_on(model, cache, ids):
    return model(ids, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("mixer", MIXERS, ids=str)
@torch.no_grad()
def test_batches_of_a_cache_are_repeated_and_selected(mixer):
    model, ids, more = build(mixer, forgetting="data"), tokens(3), tokens(3, 4, seed=2)
    expected = goes_on(model, filled(model, ids), more)
    cache = filled(model, ids)
    cache.batch_repeat_interleave(2)
    logits = goes_on(model, cache, more.repeat_interleave(2, dim=0))
    assert_close(logits, expected.repeat_interleave(2, dim=0), 1e-6)
    cache, rows = filled(model, ids), torch.tensor([2, 0, 2])
    cache.batch_select_indices(rows)
    assert_close(goes_on(model, cache, more[rows]), expected[rows], 1e-6)


@pytest.mark.parametrize("mixer", ["osdn", ["attention", "osdn"], ["osdn", "attention"]], ids=str)
@torch.no_grad()
def test_rollback_is_refused_before_anything_is_changed(mixer):
    model, ids, more = build(mixer), tokens(), tokens(2, 4, seed=2)
    cache = filled(model, ids)
    expected = goes_on(model, copy.deepcopy(cache), more)
    for method in (cache.activate_past_recording, lambda: cache.crop(-2), lambda: cache.crop(3)):
        with pytest.raises(RuntimeError, match=r"^crop, activate_past_recording: expected"):
            method()
    assert cache.get_seq_length() == 21
    assert torch.equal(goes_on(model, cache, more), expected)
    recording = DynamicCache(config=model.config)  # transformers' own, which would crop in silence
    recording.activate_past_recording()
    with pytest.raises(ValueError, match=r"^past_key_values: this cache records a past"):
        model(ids, past_key_values=recording, use_cache=True)


@torch.no_grad()
def test_a_cache_of_attention_alone_is_cropped():
    model, ids = build("attention"), tokens()
    cache = filled(model, ids)
    cache.crop(-5)
    assert cache.get_seq_length() == 16
    assert_close(goes_on(model, cache, ids[:, 16:]), model(ids).logits[:, 16:], 2e-5)


def test_assisted_decoding_is_refused_in_one_line():
    model, assistant = build(["osdn", "attention"]), build()
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful"):
        model.generate(tokens(1), assistant_model=assistant, max_new_tokens=4, do_sample=False)
