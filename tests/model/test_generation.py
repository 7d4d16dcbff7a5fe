"""Caches and generation: pieces, padding, beams, turns, and what is refused."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from osdn.model.cache import CACHE, OSDNCache
from tests.model.tiny import MIXERS, build, tokens
from tests.numerics import assert_close


@pytest.mark.parametrize("mixer", MIXERS)
def test_pieces_then_tokens_equal_one_forward(mixer):
    model, ids = build(mixer, forgetting="data"), tokens()
    cache, logits = DynamicCache(config=model.config), []
    with torch.no_grad():
        for piece in ids.split([6, 2, 9, 1, 1, 1, 1], dim=1):
            result = model(piece, past_key_values=cache, use_cache=True)
            logits.append(result.logits)
        assert_close(torch.cat(logits, 1), model(ids).logits, 2e-5)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_cache_is_read_where_it_is_not_written(mixer):
    model, ids = build(mixer), tokens()
    with torch.no_grad():
        cache = model(ids[:, :10], use_cache=True).past_key_values
        expected = model(ids).logits[:, 10:]
        for _ in range(2):
            logits = model(ids[:, 10:], past_key_values=cache, use_cache=False).logits
            assert_close(logits, expected, 2e-5)


@pytest.mark.parametrize("mixer", MIXERS)
def test_gradients_go_through_a_cache(mixer):
    """Those of a sequence in pieces are the whole one's; and those after a prefix without any."""
    # In float64: how much float32 rounds here is the processor's affair.
    model, ids = build(mixer, forgetting="data").double(), tokens()
    names, parameters = zip(*model.named_parameters())
    expected = torch.autograd.grad(model(ids).logits[:, 6:].square().sum(), parameters)
    cache, logits = OSDNCache(model.config), []
    for piece in ids.split([6, 5, 9, 1], dim=1):
        logits.append(model(piece, past_key_values=cache, use_cache=True).logits)
    found = torch.autograd.grad(torch.cat(logits[1:], 1).square().sum(), parameters)
    for name, actual, wanted in zip(names, found, expected):
        assert_close(actual, wanted, 1e-11, name)
    with torch.no_grad():
        cache = model(ids[:, :6], use_cache=True).past_key_values
    model(ids[:, 6:], past_key_values=cache, use_cache=True).logits.square().sum().backward()
    assert model.lm_head.weight.grad.isfinite().all()


@pytest.mark.parametrize("mixer", MIXERS)
def test_padding_counts_in_pieces_of_one_token(mixer):
    model, ids = build(mixer, forgetting="data"), tokens(1, 6)
    mask = torch.tensor([[0, 0, 0] + [1] * 6])
    padded = torch.cat([tokens(1, 3, seed=5), ids], 1)
    cache, logits = OSDNCache(model.config), []
    with torch.no_grad():
        for t in range(9):
            options = {"attention_mask": mask[:, : t + 1], "past_key_values": cache}
            logits.append(model(padded[:, t : t + 1], use_cache=True, **options).logits)
        assert_close(torch.cat(logits[3:], 1), model(ids).logits, 2e-5)


@pytest.mark.parametrize("mixer", MIXERS)
def test_greedy_generation_is_repeated_forward(mixer):
    model, ids = build(mixer), tokens()
    generated = model.generate(ids, max_new_tokens=6, do_sample=False)
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, ids)


@pytest.mark.parametrize("mixer", MIXERS)
def test_generation_from_embeddings_is_that_from_their_tokens(mixer):
    model, ids = build(mixer), tokens()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    expected = model.generate(ids, **options)[:, ids.shape[1] :]
    x = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=x, **options), expected)


@pytest.mark.parametrize("mixer", MIXERS)
def test_generation_goes_on_from_a_cache(mixer):
    """Two turns with one cache equal one call on everything, on transformers' sampling loop."""
    model, ids = build(mixer), tokens(1)
    options = {"do_sample": False, "return_dict_in_generate": True}
    first = model.generate(ids, max_new_tokens=4, **options)
    turn = torch.cat([first.sequences, tokens(1, 5, seed=7)], 1)
    assert first.past_key_values.get_seq_length() == first.sequences.shape[1] - 1
    second = model.generate(turn, max_new_tokens=4, **{CACHE: first.past_key_values}, **options)
    assert torch.equal(second.sequences, model.generate(turn, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("mixer", ["osdn", "attention"])
def test_a_cache_has_two_names(mixer):
    """past_key_values is called cache since transformers 5.24; the models take either name."""
    model, ids = build(mixer), tokens()
    with torch.no_grad():
        expected = model(ids).logits[:, 10:]
        for name in ("past_key_values", "cache"):
            for inner in (model, model.model):
                cache = OSDNCache(model.config)
                inner(ids[:, :10], **{name: cache}, use_cache=True)
                result = inner(ids[:, 10:], **{name: cache}, use_cache=True)
                assert result[CACHE] is cache and cache.get_seq_length() == 21
                logits = result[0] if inner is model else model.lm_head(result[0])
                assert_close(logits, expected, 2e-5)
    with pytest.raises(ValueError, match=r"^cache, past_key_values: two names"):
        model(ids, cache=cache, past_key_values=OSDNCache(model.config))


@pytest.mark.parametrize("mixer", MIXERS)
def test_beam_search_reorders_the_states(mixer):
    """With and without a cache the beams must be the same ones."""
    model, ids = build(mixer), tokens()
    options = {"max_new_tokens": 6, "num_beams": 4, "do_sample": False}
    with_cache = model.generate(ids, use_cache=True, **options)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("mixer", ["osdn", ["osdn", "attention"]])
def test_left_padded_batch_generates_as_one_by_one(mixer):
    model = build(mixer, pad_token_id=0)
    prompts = [tokens(1, n, seed=n) + 0 for n in (3, 11, 7)]
    width = max(p.shape[1] for p in prompts)
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - prompt.shape[1] :] = prompt
        mask[row, width - prompt.shape[1] :] = 1
    options = {"max_new_tokens": 5, "do_sample": False}
    together = model.generate(ids, attention_mask=mask, **options)[:, width:]
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt, **options)[0, prompt.shape[1] :]
        assert torch.equal(together[row], alone)


@pytest.mark.parametrize("mixer", MIXERS)
def test_generation_from_a_cache_of_transformers(mixer):
    """Where it can tell its length, and else an error that says which cache to give."""
    model, ids = build(mixer), tokens()
    options = {"max_new_tokens": 3, "do_sample": False}
    cache = DynamicCache(config=model.config)
    if "attention" in model.config.mixers:
        generated = model.generate(ids, **{CACHE: cache}, **options)
        assert torch.equal(generated, model.generate(ids, **options))
    else:
        with pytest.raises(ValueError, match=rf"^{CACHE}: expected an OSDNCache"):
            model.generate(ids, **{CACHE: cache}, **options)


def test_sampling_is_seeded():
    model, ids = build(), tokens()
    torch.manual_seed(3)
    first = model.generate(ids, max_new_tokens=8, do_sample=True)
    torch.manual_seed(3)
    assert torch.equal(first, model.generate(ids, max_new_tokens=8, do_sample=True))


def test_generation_that_would_be_wrong_is_refused():
    model, ids = build(["osdn", "attention"]).train(), tokens()
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
    static = StaticCache(config=model.config, max_cache_len=30)
    with pytest.raises(ValueError, match=r"^past_key_values: expected .* got StaticLayer; .* osdn"):
        model.eval()(ids, past_key_values=static, use_cache=True)
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        model.generate(ids, max_new_tokens=2, do_sample=False)
