"""Generation's step: the GPU's (without one, its launches in Triton's interpreter), the CPU's."""

import copy

import pytest
import torch

pytest.importorskip("triton", reason="Triton cannot be installed here")

from transformers import LogitsProcessorList, StoppingCriteriaList

from osdn import OSDNForCausalLM
from osdn.model import decoding, prefill, step
from osdn.model.cache import OSDNCache
from tests.model.tiny import build, tokens
from tests.numerics import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODELS = {
    "osdn": {"forgetting": "none"},
    "apf": {"forgetting": "data"},
    "all": {
        "beta_aware": True, "precond_min": 0.5, "precond_max": 1.5, "allow_neg_eigval": True,
        "use_output_gate": True, "head_dim": 12, "head_v_dim": 20, "conv_size": 3,
    },
    "delta net": {"mixer": "delta_net", "conv_size": 1},
    "gated delta net": {"mixer": "gated_delta_net"},
    "the wider layer second": {"mixer": ["delta_net", "osdn"], "forgetting": "data"},
    "all and state decay": {
        "forgetting": "data", "state_decay": "data", "use_output_gate": True, "head_v_dim": 20,
    },
}  # fmt: skip


@pytest.fixture(autouse=True, params=["kernels", "products"])
def steps(monkeypatch, request):
    """How many tokens went through a step: the GPU's (without one, interpreted) or the CPU's."""
    if request.param == "products" and DEVICE == "cuda":
        pytest.skip("the CPU's step has nothing to do on a GPU")
    if request.param == "kernels" and DEVICE == "cpu":
        for module in (decoding, step):
            monkeypatch.setattr(module, "captures", lambda device: True)
    counted, run = [], step.DecodingStep.run
    monkeypatch.setattr(step.DecodingStep, "run", lambda *given: counted.append(1) or run(*given))
    return counted


def make(**fields) -> OSDNForCausalLM:
    sizes = {"num_hidden_layers": 1, "intermediate_size": 24, "pad_token_id": 0}
    model = build(**sizes | fields).to(DEVICE)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("gamma_proj.bias"):
                p.fill_(1.5)  # a γ that matters
            elif name.endswith(("A_log", "dt_bias")):
                p.fill_(-0.5)  # and an α
            elif "norm" in name:
                p.uniform_(0.5, 1.5)
    return model


def both(model, ids, **options):
    """What generate gives with the step and without."""
    return [
        model.generate(ids.to(DEVICE), disable_compile=off, **{"do_sample": False} | options)
        for off in (False, True)
    ]


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_logits_and_states_are_the_layers(fields, steps):
    model, ids = make(num_hidden_layers=2, **fields), tokens(3, 9).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :2] = mask[2, -2] = 0  # padding on the left, and a token that counts for nothing
    caches = [model(ids[:, :5], mask[:, :5]).past_key_values for _ in range(2)]
    caches[0].captured = True
    for t in range(5, 9):
        logits = [
            model(ids[:, t : t + 1], mask[:, : t + 1], past_key_values=cache, use_cache=True).logits
            for cache in caches
        ]
        assert_close(*(x[mask[:, t] == 1] for x in logits), 1e-5)
    assert len(steps) == 4
    for actual, expected in zip(*map(step.tensors_of, caches)):
        assert_close(actual, expected, 1e-5)
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 9


@torch.no_grad()
def test_a_block_in_prefill_is_the_block_with_state_decay():
    block = make(state_decay="data", forgetting="data").model.layers[0]
    h = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    mask = torch.ones(2, 9, dtype=torch.bool, device=DEVICE)
    mask[1, :4] = False
    y, _states = prefill.forward(block, h, mask, ~mask[..., None])
    assert_close(y[mask], block(h, attention_mask=mask)[mask], 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_a_short_prompt_is_the_layers(masked, steps):
    """Padded to a power of two, and captured at its second use; T shorter than a history too."""
    model = make(forgetting="data", conv_size=4)
    for T in (2, 9, 9, 70, 9):
        ids = tokens(2, T, seed=T).to(DEVICE)
        mask = torch.ones_like(ids)
        if masked:
            mask[0, : T // 2] = mask[1, T // 3 : T // 2] = 0
        caches = [OSDNCache(model.config) for _ in range(2)]
        caches[0].captured = True
        logits = [
            model(ids, mask, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            for cache in caches
        ]
        assert_close(*logits, 1e-5)
        for actual, expected in zip(*map(step.tensors_of, caches)):
            assert_close(actual, expected, 1e-5)
        assert [cache.get_seq_length() for cache in caches] == [T, T]
    if not decoding.captured_steps.get(model):
        return  # on a CPU a prompt goes through the layers
    prompts = decoding.captured_steps[model][2].prompts
    assert {size: prompt.uses for size, prompt in prompts.items()} == {128: 1, 64: 4}
    assert prompts[64].replay is not None and prompts[128].replay is None


def test_greedy(steps):
    found, eager = both(make(), tokens(1, 5), max_new_tokens=6)
    assert torch.equal(found, eager) and len(steps) == 5


def test_left_padded_batch(steps):
    ids = tokens(2, 7)
    ids[0, :3] = 0
    mask = (torch.arange(7) >= torch.tensor([[3], [0]])).long().to(DEVICE)
    found, eager = both(make(), ids, attention_mask=mask, max_new_tokens=4)
    assert torch.equal(found, eager) and len(steps) == 3


def test_sampling_with_processors_and_criteria(steps):
    """Both loops draw the same numbers, so the tokens are the same if the logits are."""
    seen = []

    def forbid(ids, scores):
        return scores.index_fill(1, torch.tensor([7], device=scores.device), -torch.inf)

    def enough(ids, scores):
        seen.append(ids.shape[1])
        return torch.full((len(ids),), ids.shape[1] >= 9, device=ids.device)

    model, found = make(), []
    for off in (False, True):
        torch.manual_seed(5)
        found.append(
            model.generate(
                tokens(2, 5).to(DEVICE), do_sample=True, max_new_tokens=9, disable_compile=off,
                logits_processor=LogitsProcessorList([forbid]), top_k=0,
                stopping_criteria=StoppingCriteriaList([enough]),
            )
        )  # fmt: skip
    assert torch.equal(*found) and found[0].shape[1] == 9 and len(steps) == 3 == len(seen) // 2 - 1
    assert not (found[0][:, 5:] == 7).any()


def test_streamer(steps):
    class Streamer:
        def __init__(self):
            self.got, self.ended = [], False

        def put(self, value):
            self.got += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer, ids = Streamer(), tokens(1, 5).to(DEVICE)
    generated = make().generate(ids, max_new_tokens=4, do_sample=False, streamer=streamer)
    assert streamer.got == generated[0].tolist() and streamer.ended and len(steps) == 3


def test_beam_search_reorders_in_place(steps):
    found, eager = both(make(), tokens(1, 5), max_new_tokens=5, num_beams=3)
    assert torch.equal(found, eager) and len(steps) == 4


@pytest.mark.slow
def test_two_conversations_take_turns(steps):
    """Two caches of one batch size share a step; each keeps its own states."""
    model = make()
    options = {"do_sample": False, "return_dict_in_generate": True, "max_new_tokens": 3}
    prompts = [tokens(1, 5, seed=s).to(DEVICE) for s in (1, 2)]
    first = [model.generate(ids, **options) for ids in prompts]
    for result in first:
        more = torch.cat([result.sequences, tokens(1, 2, seed=9).to(DEVICE)], 1)
        again = model.generate(more, past_key_values=result.past_key_values, **options).sequences
        assert torch.equal(again, model.generate(more, do_sample=False, max_new_tokens=3,
                                                 disable_compile=True))  # fmt: skip
    assert len(steps) == 8


@torch.no_grad()
@pytest.mark.slow
def test_a_copied_cache_goes_its_own_way():
    model, ids = make(), tokens(1, 8).to(DEVICE)
    cache = model(ids[:, :4]).past_key_values
    cache.captured = True
    model(ids[:, 4:5], past_key_values=cache)
    other = copy.deepcopy(cache)
    for one, token in ((cache, 5), (other, 6), (cache, 6)):
        logits = model(ids[:, token : token + 1], past_key_values=one).logits
    assert_close(logits[:, -1], model(ids[:, :7]).logits[:, -1], 1e-5)
    logits = model(ids[:, 7:8], past_key_values=other).logits[:, -1]
    assert_close(logits, model(ids[:, [0, 1, 2, 3, 4, 6, 7]]).logits[:, -1], 1e-5)


@torch.no_grad()
def test_weights_may_change_and_move():
    model, ids = make(), tokens(1, 8).to(DEVICE)
    cache = model(ids[:, :4]).past_key_values
    cache.captured = True
    model(ids[:, 4:5], past_key_values=cache)
    before = decoding.captured_steps[model][1]
    for change in ("in place", "replaced"):
        weight = model.model.layers[0].attn.q_proj.weight
        if change == "in place":
            weight.mul_(-0.5)
        else:
            model.model.layers[0].attn.q_proj.weight = torch.nn.Parameter(weight * 2)
        options = {"max_new_tokens": 3}
        assert torch.equal(*both(model, ids, **options)), change
        assert (decoding.captured_steps[model][1] is before) == (change == "in place")


@torch.no_grad()
@pytest.mark.slow
def test_a_rule_may_change(steps):
    """What a layer fixes is read again for the next text."""
    model, ids = make(), tokens(1, 8).to(DEVICE)
    before = both(model, ids, max_new_tokens=8, return_dict_in_generate=True, output_logits=True)
    model.model.layers[0].attn.rule["eta"] = 0.2
    model.model.layers[0].attn.initial_precond.fill_(0.5)
    made, eager = both(
        model, ids, max_new_tokens=8, return_dict_in_generate=True, output_logits=True
    )
    assert not torch.allclose(made.logits[0], before[0].logits[0], atol=1e-3)
    for ours, theirs in zip(made.logits, eager.logits):
        assert_close(ours, theirs, 1e-5)
    assert steps


@torch.no_grad()
def test_hooks_and_wrapped_layers_are_not_passed_over(steps):
    model, called = make(), []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: called.append(1))
    model.generate(tokens(1, 4).to(DEVICE), max_new_tokens=3, do_sample=False)
    assert len(called) == 3 and not steps
    handle.remove()
    model.generate(tokens(1, 4).to(DEVICE), max_new_tokens=3, do_sample=False)
    assert len(called) == 3 and len(steps) == 2


def test_models_with_attention_decode_by_their_layers(steps):
    model = make(mixer=["osdn", "attention"], num_hidden_layers=2)
    found, eager = both(model, tokens(1, 4), max_new_tokens=3)
    assert torch.equal(found, eager) and not steps


@torch.no_grad()
def test_gradients_and_a_bare_loop_take_the_layers(steps):
    model, ids = make(), tokens(1, 6).to(DEVICE)
    cache = model(ids[:, :5]).past_key_values
    model(ids[:, 5:], past_key_values=cache)
    cache.captured = True
    with torch.enable_grad():
        model(ids[:, 5:], past_key_values=cache).logits.sum().backward()
    assert not steps and isinstance(cache, OSDNCache)


@torch.no_grad()
def test_the_most_recent_batch_sizes_stay():
    model = make()
    for batch in (1, 2, 3, 1, 4, 5):
        cache = model(tokens(batch, 3).to(DEVICE)).past_key_values
        cache.captured = True
        model(tokens(batch, 1).to(DEVICE), past_key_values=cache)
    assert list(decoding.captured_steps[model]) == [3, 1, 4, 5]
    copy.deepcopy(model)  # no graph is part of the model
