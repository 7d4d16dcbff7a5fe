"""transformers' gated models compute the same with our operator in place of their functions."""

from contextlib import nullcontext
from importlib import import_module

import pytest
import torch

from osdn.integrations.transformers import MODELS, SIGNATURES, _modules, accelerate

LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 24, "linear_conv_kernel_dim": 4,
}  # fmt: skip
SIZES = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}  # fmt: skip
CONFIGS = {
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", EXPERTS),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", {}),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", EXPERTS),
    "qwen4_exp": (
        "Qwen4ExpTextConfig",
        "Qwen4ExpForCausalLM",
        EXPERTS
        | {"hc_count": 2, "hc_lowrank": 8, "ngram_vocab_size_base": 50}
        | {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16}
        | {"indexer_budget": 128, "indexer_compress_ratio": 4},
    ),
    "olmo_hybrid": ("OlmoHybridConfig", "OlmoHybridForCausalLM", {"linear_num_key_heads": 4}),
}


def tiny(name):
    """A random model of one kind, in float32."""
    module = import_module(f"transformers.models.{name}")
    config_name, model_name, options = CONFIGS[name]
    config = getattr(module, config_name)(**SIZES | LINEAR | options)
    torch.manual_seed(0)
    return getattr(module, model_name)(config).eval()


@pytest.fixture(autouse=True)
def own_functions():
    """transformers' PyTorch functions: where FLA is installed, its GPU kernels fail on a CPU."""
    replaced = []
    for module in _modules():
        for name in SIGNATURES:
            wrapped = getattr(module, name)
            replaced.append((module, name, wrapped))
            setattr(module, name, getattr(wrapped, "__wrapped__", wrapped))
    yield
    for module, name, wrapped in replaced:
        setattr(module, name, wrapped)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_tokens_are_the_same(name):
    """Whole, left-padded, in pieces with a cache, and decoded greedily."""
    model = tiny(name)
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 100, (2, 90), generator=random)
    mask = torch.ones_like(ids)
    mask[1, :17] = 0

    def everything():
        with torch.no_grad():
            whole = model(ids).logits
            padded = model(ids, attention_mask=mask).logits[mask.bool()]
            first = model(ids[:, :60], use_cache=True)
            rest = model(ids[:, 60:], past_key_values=first.past_key_values, use_cache=True).logits
            tokens = model.generate(
                ids, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False
            )
        return whole, padded, rest, tokens

    expected = everything()
    with accelerate():
        made = everything()
    for ours, theirs in zip(made[:3], expected[:3]):
        assert (ours - theirs).abs().max() < 1e-4
    assert torch.equal(made[3], expected[3])


def test_gradients_are_the_same():
    model = tiny("qwen3_5").train()
    ids = torch.randint(3, 100, (2, 70), generator=torch.Generator().manual_seed(2))
    gradients = []
    for context in (nullcontext(), accelerate()):
        with context:
            model.zero_grad()
            model(ids, labels=ids).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, theirs in gradients[0].items():
        scale = theirs.abs().max().clamp(min=1e-3)
        assert ((gradients[1][name] - theirs).abs().max() / scale) < 1e-3, name


def test_packed_documents_do_not_see_each_other():
    """transformers' PyTorch functions refuse packing; ours gives each document's own logits."""
    model = tiny("qwen3_5")
    ids = torch.randint(3, 100, (1, 50), generator=torch.Generator().manual_seed(3))
    with accelerate(), torch.no_grad():
        alone = [model(ids[:, :20]).logits, model(ids[:, 20:]).logits]
        offsets = torch.tensor([0, 20, 50], dtype=torch.int32)
        layer = model.model.layers[0].linear_attn
        x = torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(4))
        together = layer(x, cu_seq_lens_q=offsets)
        apart = torch.cat([layer(x[:, :20]), layer(x[:, 20:])], dim=1)
    assert (together - apart).abs().max() < 1e-5
    assert all(torch.isfinite(x).all() for x in alone)


def test_twice_is_once_and_all_is_restored():
    before = [getattr(module, name) for module in _modules() for name in SIGNATURES]
    outer = accelerate()
    during = [getattr(module, name) for module in _modules() for name in SIGNATURES]
    with accelerate():
        inner = [getattr(module, name) for module in _modules() for name in SIGNATURES]
    assert inner == during and not set(during) & set(before)
    assert [getattr(m, n) for m in _modules() for n in SIGNATURES] == during
    outer.restore()
    assert [getattr(m, n) for m in _modules() for n in SIGNATURES] == before


def test_another_signature_is_refused_before_anything_is_changed(monkeypatch):
    module = _modules()[-1]
    before = [getattr(m, n) for m in _modules()[:-1] for n in SIGNATURES]

    def other(query, key, value, decay):
        raise NotImplementedError

    monkeypatch.setattr(module, "torch_recurrent_gated_delta_rule", other)
    with pytest.raises(RuntimeError, match=r"torch_recurrent_gated_delta_rule.*knows transformers"):
        accelerate()
    names = [f"transformers.models.{model}" for model in MODELS[:-1]]
    modules = [import_module(f"{n}.modeling_{n.rsplit('.', 1)[1]}") for n in names]
    assert [getattr(m, n) for m in modules for n in SIGNATURES] == before
