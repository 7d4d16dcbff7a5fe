"""transformers' gated models compute the same with our operator in place of their functions."""

import inspect
import subprocess
import sys
from contextlib import nullcontext
from importlib import import_module

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models import qwen3_5, qwen3_next

from osdn import OSDNConfig, OSDNForCausalLM
from osdn.errors import UserError
from osdn.integrations.transformers import accelerate, load_upgraded, upgrade
from osdn.integrations.transformers.functions import MODELS, SIGNATURES, known_modules

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


OWN = {"hidden_size": 32, "num_heads": 2, "num_hidden_layers": 1, "vocab_size": 61}


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
    for module in known_modules():
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
    before = [getattr(module, name) for module in known_modules() for name in SIGNATURES]
    outer = accelerate()
    during = [getattr(module, name) for module in known_modules() for name in SIGNATURES]
    with accelerate():
        inner = [getattr(module, name) for module in known_modules() for name in SIGNATURES]
    assert inner == during and not set(during) & set(before)
    assert [getattr(m, n) for m in known_modules() for n in SIGNATURES] == during
    outer.restore()
    assert [getattr(m, n) for m in known_modules() for n in SIGNATURES] == before


def test_another_signature_is_refused_before_anything_is_changed(monkeypatch):
    module = known_modules()[-1]
    before = [getattr(m, n) for m in known_modules()[:-1] for n in SIGNATURES]

    def other(query, key, value, decay):
        raise NotImplementedError

    monkeypatch.setattr(module, "torch_recurrent_gated_delta_rule", other)
    with pytest.raises(RuntimeError, match=r"torch_recurrent_gated_delta_rule.*knows transformers"):
        accelerate()
    names = [f"transformers.models.{model}" for model in MODELS[:-1]]
    modules = [import_module(f"{n}.modeling_{n.rsplit('.', 1)[1]}") for n in names]
    assert [getattr(m, n) for m in modules for n in SIGNATURES] == before


def everything(model, ids, mask):
    """Logits whole, padded and in pieces with a cache, and greedy tokens."""
    with torch.no_grad():
        first = model(ids[:, :60], use_cache=True)
        return (
            model(ids).logits,
            model(ids, attention_mask=mask).logits[mask.bool()],
            model(ids[:, 60:], past_key_values=first.past_key_values, use_cache=True).logits,
            model.generate(
                ids, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False
            ),
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_an_upgraded_model_computes_what_it_did(name, tmp_path):
    """Before training; and after a change of d_1, saved and loaded, what it does then."""
    model = tiny(name)
    ids = torch.randint(3, 100, (2, 90), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    before = everything(model, ids, mask)
    assert upgrade(model) is model
    made = everything(model, ids, mask)
    for ours, theirs in zip(made[:3], before[:3]):
        assert (ours - theirs).abs().max() < 1e-4
    assert torch.equal(made[3], before[3])

    layers = [layer for layer in model.modules() if hasattr(layer, "initial_precond")]
    assert [layer.initial_precond.shape for layer in layers] == [(4, 16)] * 3
    with torch.no_grad():
        for layer in layers:
            layer.initial_precond.uniform_(0.4, 1.6)
    changed = everything(model, ids, mask)
    assert (changed[0] - before[0]).abs().max() > 1e-3
    assert (changed[2] - changed[0][:, 60:]).abs().max() < 1e-4  # d goes on in the cache
    model.save_pretrained(tmp_path)
    loaded = load_upgraded(tmp_path).eval()
    assert type(loaded) is type(model)
    for again, first in zip(everything(loaded, ids, mask), changed):
        assert torch.equal(again, first)


def moved(model):
    """The model, its d_1 no longer at 1, in evaluation."""
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("initial_precond"):
                p.copy_(0.4 + 1.2 * torch.rand(p.shape, generator=random))
    return model.eval()


def with_vision():
    """A Qwen3.5 as it is published: a text model beside one for images."""
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2,
              "out_hidden_size": 32}  # fmt: skip
    config = qwen3_5.Qwen3_5Config(text_config=SIZES | LINEAR, vision_config=vision)
    torch.manual_seed(0)
    return qwen3_5.Qwen3_5ForConditionalGeneration(config)


@pytest.mark.parametrize("name", [*CONFIGS, "with vision", "its text only"])
def test_a_checkpoint_is_upgraded_saved_and_loaded(name, tmp_path):
    """from_pretrained may rename and join weights; what it did is not undone in the new files."""
    source = tiny(name) if name in CONFIGS else with_vision()
    source.save_pretrained(tmp_path / "source")
    kind = type(source) if name == "with vision" else AutoModelForCausalLM
    model = moved(upgrade(kind.from_pretrained(tmp_path / "source")))
    assert model.config.model_type.startswith("osdn_")
    ids = torch.randint(3, 100, (2, 30), generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "first")
    load_upgraded(tmp_path / "first").save_pretrained(tmp_path / "second")
    with torch.no_grad():
        expected = model(ids).logits
        for place in ("first", "second"):
            assert torch.equal(load_upgraded(tmp_path / place).eval()(ids).logits, expected)


@pytest.mark.parametrize(
    "kind", [qwen3_5.Qwen3_5TextForSequenceClassification,
             qwen3_next.Qwen3NextForTokenClassification]
)  # fmt: skip
def test_a_classifier_is_upgraded_saved_and_loaded(kind, tmp_path):
    config = tiny("qwen3_5" if "3_5" in kind.__name__ else "qwen3_next").config
    model = moved(upgrade(kind(config)))
    ids = torch.randint(3, 100, (2, 30), generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path)
    loaded = load_upgraded(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_several_models_of_one_configuration(tmp_path):
    """The others are as they were, and AutoModelForCausalLM knows the language model still."""
    first = tiny("qwen3_5")
    second, third = (type(first)(first.config).eval() for _ in range(2))
    body = qwen3_5.Qwen3_5TextModel(first.config)
    moved(upgrade(first))
    upgrade(second, eta=0.5)
    upgrade(body)
    assert first.config is first.model.config
    assert (first.config.osdn["eta"], second.config.osdn["eta"]) == (1.0, 0.5)
    assert third.config.model_type == "qwen3_5_text"
    ids = torch.randint(3, 100, (2, 30), generator=torch.Generator().manual_seed(1))
    for name, model in (("first", first), ("third", third)):
        model.save_pretrained(tmp_path / name)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_d_1_is_trained_alone_through_a_cache():
    """The first layer's q and k need no gradient then, and its state does; pieces are the whole."""
    model = moved(upgrade(tiny("qwen3_5")))
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("initial_precond"))
    ids = torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(1))
    whole = model(ids).logits
    out = model(ids[:, :17], use_cache=True)
    made = [out.logits]
    for t in range(17, 20):
        out = model(ids[:, t : t + 1], past_key_values=out.past_key_values)
        made.append(out.logits)
    made = torch.cat(made, dim=1)
    assert made.requires_grad and (made - whole).abs().max() < 1e-5


def test_the_functions_take_all_by_name():
    module = import_module("transformers.models.qwen3_5.modeling_qwen3_5")
    random = torch.Generator().manual_seed(4)
    q, k, v = torch.randn(3, 1, 9, 2, 8, generator=random)
    g, beta = -torch.rand(1, 9, 2, generator=random), torch.rand(1, 9, 2, generator=random)
    given = {"query": q, "key": k, "value": v, "g": g, "beta": beta}
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        expected = getattr(module, name)(**given, use_qk_l2norm_in_kernel=True)[0]
        with accelerate():
            made = getattr(module, name)(**given, use_qk_l2norm_in_kernel=True)[0]
        assert (made - expected).abs().max() < 1e-5


def test_the_preconditioner_is_that_of_the_operator():
    """An upgraded layer's output is the reference's, from the layer's own q, k, v and gates."""
    from osdn.integrations.transformers import upgrading
    from osdn.ops import online_scaled_delta_rule

    model = upgrade(tiny("qwen3_5").double(), eta=0.7, precond_min=0.5, precond_max=1.5)
    layer, given = model.model.layers[0].linear_attn, []
    with torch.no_grad():
        layer.initial_precond.uniform_(0.3, 1.7)  # outside the box too
    inner = inspect.getclosurevars(type(layer).forward).nonlocals["inner"]
    names = inspect.unwrap(inner).__globals__
    original = names["torch_chunk_gated_delta_rule"]

    def recorded(*args, **options):
        given.append((args, options))
        given.append(original(*args, **options)[0])
        return given[-1], None

    names["torch_chunk_gated_delta_rule"] = recorded
    try:
        layer(torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(4)).double())
    finally:
        names["torch_chunk_gated_delta_rule"] = original
    (q, k, v), options = given[0]
    # The heads of q and k are repeated by the rule; in transformers 5.17 by the layer, before it.
    q, k = (x.double().repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
    q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    length = k.norm(dim=-1, keepdim=True)
    assert length.min() < 0.99  # keys that transformers' normalisation leaves short
    k, v, beta = k / length, v / length, options["beta"] * length.squeeze(-1) ** 2
    o, _, _ = online_scaled_delta_rule(
        q, k, v, beta, log_alpha=options["g"].double(), eta=0.7, precond_min=0.5,
        precond_max=1.5, initial_precond=layer.initial_precond.clamp(0.5, 1.5).double(),
        backend="reference",
    )  # fmt: skip
    assert upgrading.RULES[0] == "torch_chunk_gated_delta_rule"
    assert (given[1] - o).abs().max() < 1e-5 * o.abs().max()


def test_d_1_is_trained_with_the_rest_and_beams_keep_their_own_d():
    model = upgrade(tiny("qwen3_5")).train()
    ids = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    starts = [layer.linear_attn.initial_precond for layer in model.model.layers[:3]]
    assert losses[-1] < losses[0] - 1 and all((d != 1).any() for d in starts)
    model.eval()
    options = {"num_beams": 3, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached = model.generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


def test_packed_documents_of_an_upgraded_layer_do_not_see_each_other():
    layer = upgrade(tiny("qwen3_5")).model.layers[0].linear_attn
    offsets = torch.tensor([0, 20, 50], dtype=torch.int32)
    x = torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(4))
    with torch.no_grad(), accelerate():
        layer.initial_precond.uniform_(0.4, 1.6)
        together = layer(x, cu_seq_lens_q=offsets)
        apart = torch.cat([layer(x[:, :20]), layer(x[:, 20:])], dim=1)
    assert (together - apart).abs().max() < 1e-5


def test_acceleration_and_an_upgrade_do_not_disturb_each_other():
    plain, model = tiny("qwen3_5"), upgrade(tiny("qwen3_5"))
    ids = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for layer in model.model.layers[:3]:
            layer.linear_attn.initial_precond.uniform_(0.4, 1.6)
        before = plain(ids).logits, model(ids).logits
        with accelerate():
            during = plain(ids).logits, model(ids).logits
        after = plain(ids).logits, model(ids).logits
    for made in (during, after):
        assert all((a - b).abs().max() < 1e-4 for a, b in zip(made, before))


def test_what_cannot_be_upgraded_or_loaded_is_named(tmp_path):
    model = tiny("qwen3_5")
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match="expected an upgraded model, saved by osdn, got a Qwen3_5"):
        load_upgraded(tmp_path / "plain")
    with pytest.raises(UserError, match=r"expected the configuration of a model"):
        load_upgraded(tmp_path / "nothing")
    (tmp_path / "odd").mkdir()
    for words in ('{"architectures": [null], "model_type": null}', '{"architectures": ["A"], '
                  '"model_type": 1}'):  # fmt: skip
        (tmp_path / "odd" / "config.json").write_text(words)
        with pytest.raises(UserError, match="expected an upgraded model, saved by osdn"):
            load_upgraded(tmp_path / "odd")
    with pytest.raises(ValueError, match="expected a model of transformers, got Linear"):
        upgrade(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="eta: expected"):
        upgrade(model, eta=3.0)
    with pytest.raises(ValueError, match="not upgraded yet"):
        upgrade(upgrade(model))
    with pytest.raises(ValueError, match="which has none"):
        upgrade(OSDNForCausalLM(OSDNConfig(**OWN)))
    model.save_pretrained(tmp_path / "upgraded")
    weights = load_file(tmp_path / "upgraded" / "model.safetensors")
    del weights["model.layers.1.linear_attn.initial_precond"]
    save_file(weights, tmp_path / "upgraded" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"weights missing: model\.layers\.1.*initial_precond"):
        load_upgraded(tmp_path / "upgraded")
    (tmp_path / "upgraded" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights to load"):
        load_upgraded(tmp_path / "upgraded")
    code = (
        "import sys\nfrom transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "upgraded")], capture_output=True, text=True
    )
    assert result.returncode != 0 and "osdn_qwen3_5_text" in result.stderr  # not half of it


WITH_FLA = """
import sys, torch
from osdn.integrations.transformers import accelerate
from osdn.integrations.transformers.functions import SIGNATURES, known_modules
from tests.integrations.test_transformers import tiny

if __name__ == "__main__":
    model, ids = tiny("qwen3_5"), torch.arange(3, 93)[None]
    with torch.no_grad():
        with accelerate():
            found = model(ids).logits
            tokens = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        for module in known_modules():
            for name in SIGNATURES:  # transformers' PyTorch functions
                setattr(module, name, getattr(module, name).__wrapped__)
        assert (found - model(ids).logits).abs().max() < 1e-4
        assert torch.equal(tokens, model.generate(ids, max_new_tokens=4, min_new_tokens=4,
                                                  do_sample=False))
    print("fla" in sys.modules)
"""


@pytest.mark.slow
def test_where_fla_is_installed_the_model_runs_on_a_cpu():
    """In a process of its own, whose transformers takes FLA's functions where it finds them."""
    pytest.importorskip("fla", reason="needs flash-linear-attention")
    result = subprocess.run([sys.executable, "-c", WITH_FLA], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split() == ["True"]
