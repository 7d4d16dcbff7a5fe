"""Padding anywhere in a row: every real token's logits are those of the row without padding."""

from itertools import pairwise

import pytest
import torch

from osdn.layers.osdn import OSDN
from osdn.model.cache import OSDNCache
from tests.model.tiny import MIXERS, build, tokens
from tests.numerics import assert_close, relative_error

MASKS = 40
T = 18


def random_masks(n, B=3, T=T):
    """Rows with padding on the left, on the right, in between, nearly everywhere, nowhere."""
    generator = torch.Generator().manual_seed(11)
    for i in range(n):
        density = (0.1, 0.5, 0.9)[i % 3]
        mask = (torch.rand(B, T, generator=generator) < density).long()
        mask[:, int(torch.randint(T, (), generator=generator))] = 1
        if i % 4 == 0:
            mask[0], mask[-1] = mask[0].sort()[0], mask[-1].sort(descending=True)[0]
        yield mask


def in_float64(mixer, backend, **fields):
    return with_backend(build(mixer, forgetting="data", **fields).double(), backend)


def alone(model, ids, mask):
    """Logits of every row's real tokens, each row by itself."""
    return [model(row[kept][None]).logits[0] for row, kept in zip(ids, mask.bool())]


def with_backend(model, backend):
    for module in model.modules():
        if isinstance(module, OSDN):
            module.backend = backend
    return model


def both_ways(model, ids, mask, cut):
    """Logits [B, T, vocabulary] in one forward, and in pieces of `cut` tokens with a cache."""
    whole = model(ids, attention_mask=mask).logits
    cache, logits, end = OSDNCache(model.config), [], 0
    for piece in ids.split(cut, dim=1):
        end += piece.shape[1]
        given = {"attention_mask": mask[:, :end], "past_key_values": cache}
        logits.append(model(piece, use_cache=True, **given).logits)
    return {"one forward": whole, "pieces": torch.cat(logits, 1)}


CUTS = [[T], [7, 5, 6], [1] * T, [10, 1, 1, 1, 5]]


@pytest.mark.parametrize("mixer", MIXERS, ids=str)
@pytest.mark.parametrize("backend", ["numba", "chunkwise"])
@torch.no_grad()
def test_logits_are_those_of_each_row_alone(mixer, backend):
    """In one forward, in pieces with a cache, and token by token, over 40 random masks."""
    model = in_float64(mixer, backend)
    for i, mask in enumerate(random_masks(MASKS)):
        ids = tokens(3, T, seed=i)
        expected = alone(model, ids, mask)
        for kind, result in both_ways(model, ids, mask, CUTS[i % 4]).items():
            for row, kept in enumerate(mask.bool()):
                assert_close(result[row, kept], expected[row], 1e-9, f"mask {i}, {kind}, row {row}")


@pytest.mark.slow
@pytest.mark.parametrize("mixer", [m for m in MIXERS if m != "attention"], ids=str)
@torch.no_grad()
def test_kernels_give_the_logits_of_each_row_alone(mixer):
    """The kernels in float32 (without a GPU in Triton's interpreter): 40 random masks, in a batch.

    The floor is the kernels' of tests/ops/running_triton.py, for each of the two blocks.
    """
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    exact = in_float64(mixer, "chunkwise").to(device)
    model = build(mixer, forgetting="data").to(device)
    mask = torch.cat([mask[i % 3 : i % 3 + 1] for i, mask in enumerate(random_masks(MASKS))])
    ids, mask = tokens(MASKS, T).to(device), mask.to(device)
    expected = alone(exact, ids, mask)
    plain = both_ways(with_backend(model, "chunkwise"), ids, mask, [10, 1, 7])
    found = both_ways(with_backend(model, "triton"), ids, mask, [10, 1, 7])
    for kind, result in found.items():
        for row, kept in enumerate(mask.bool()):
            error = relative_error(plain[kind][row, kept], expected[row])
            assert_close(
                result[row, kept], expected[row], 2 * error + 2 * 5e-6, f"{kind}, mask {row}"
            )


@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_a_right_padded_batch_generates_as_one_by_one(mixer):
    model = build(mixer, forgetting="data", pad_token_id=0)
    prompts = [tokens(1, n, seed=n) for n in (3, 11, 1)]
    ids, mask = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : prompt.shape[1]], mask[row, : prompt.shape[1]] = prompt, 1
    cache = OSDNCache(model.config)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        turn = tokens(3, 4, seed=9)
        mask = torch.cat([mask, torch.ones_like(turn)], 1)
        result = model(turn, attention_mask=mask, past_key_values=cache, use_cache=True)
        for row, prompt in enumerate(prompts):
            whole = torch.cat([prompt, turn[row : row + 1]], 1)
            assert_close(result.logits[row], model(whole).logits[0, -4:], 2e-5, f"row {row}")


@pytest.mark.parametrize("mixer", ["osdn", ["attention", "delta_net"]], ids=str)
def test_gradients_are_those_of_each_row_alone(mixer):
    model = in_float64(mixer, "chunkwise").train()
    names, parameters = zip(*model.named_parameters())
    ids = tokens(3, T)
    for mask in random_masks(3):
        rows = alone(model, ids, mask)
        expected = torch.autograd.grad(sum(x.square().sum() for x in rows), parameters)
        logits = model(ids, attention_mask=mask).logits[mask.bool()]
        found = torch.autograd.grad(logits.square().sum(), parameters)
        for name, actual, wanted in zip(names, found, expected):
            assert_close(actual, wanted, 1e-9, name)


@pytest.mark.parametrize("mixer", MIXERS, ids=str)
@torch.no_grad()
def test_padding_within_packed_documents(mixer):
    model, ids = in_float64(mixer, "chunkwise"), tokens(1, T)
    offsets = [0, 5, 11, T]
    for i, mask in enumerate(random_masks(6, B=1)):
        mask[0, offsets[:-1]] = 1
        logits = model(ids, attention_mask=mask, cu_seqlens=torch.tensor(offsets)).logits
        for start, end in pairwise(offsets):
            kept = mask[0, start:end].bool()
            expected = model(ids[:, start:end][:, kept]).logits[0]
            assert_close(logits[0, start:end][kept], expected, 1e-9, f"mask {i}, {start}:{end}")


@pytest.mark.parametrize("mixer", ["osdn", "attention"])
def test_numbers_of_documents_in_the_mask_are_refused(mixer):
    mask = torch.tensor([[1, 1, 1, 2, 2, 0]])
    with pytest.raises(ValueError, match=r"^attention_mask: expected zeros and ones.*seq_idx"):
        build(mixer)(tokens(1, 6), attention_mask=mask)


def test_padding_in_front_of_a_decay_of_zero():
    """log α = −∞, a memory that keeps nothing: padding leaves no NaN behind, alone or cached."""
    model, ids = build("gated_delta_net"), tokens(1, 6)
    with torch.no_grad():
        for block in model.model.layers:
            block.attn.A_log.fill_(100.0)  # exp(100) is infinite in float32
        padded, mask = torch.cat([tokens(1, 3, seed=5), ids], 1), torch.tensor([[0] * 3 + [1] * 6])
        expected = model(ids).logits
        assert_close(model(padded, attention_mask=mask).logits[:, 3:], expected, 2e-5)
    options = {"max_new_tokens": 4, "do_sample": False}
    made = model.generate(padded, attention_mask=mask, **options)[:, 9:]
    assert torch.equal(made, model.generate(ids, **options)[:, 6:])
