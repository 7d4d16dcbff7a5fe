"""The OSDN layer alone: its function, padding, packing, pieces, and what its options do."""

import itertools

import pytest
import torch
from torch.nn.functional import (
    conv1d,
    pad,
    rms_norm,
    scaled_dot_product_attention,
    silu,
    softplus,
)
from transformers import DynamicCache

from osdn import OSDN, OSDNConfig, online_scaled_delta_rule
from osdn.layers import attention
from osdn.layers import osdn as mixers
from osdn.layers.attention import Attention
from osdn.layers.convolution import ShortConvolution
from tests.numerics import assert_close

D, H, T = 32, 2, 19


def build(kind=OSDN, **options):
    torch.manual_seed(0)
    layer = kind(D, H, layer_idx=0, **options)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "conv1d" in name or name.endswith("proj.weight"):
                parameter.normal_(std=0.4)
            elif name == "initial_precond":
                parameter.normal_(mean=1.0, std=0.2)
    return layer.eval()


class GatedOSDN(OSDN):
    """OS-GDN: a memory that decays too."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, state_decay="data", **options)


KINDS = [OSDN, GatedOSDN, Attention]


def forgetful(kind):
    return {} if kind is Attention else {"forgetting": "data"}


def hidden(B=2, T=T, seed=1):
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed))


VARIANTS = [
    {},
    {"adaptive": False},
    {"forgetting": "data", "beta_aware": True, "eta": 0.7},
    {"precond_min": 0.6, "precond_max": 1.4, "use_output_gate": True, "head_v_dim": 24},
    {"adaptive": False, "state_decay": "data", "use_output_gate": True, "head_v_dim": 32},
    {"forgetting": "data", "state_decay": "data"},
]


@pytest.mark.parametrize("options", VARIANTS)
def test_layer_is_its_docstring(options):
    """Written out once more, from the projections to the output."""
    layer, x = build(**options), hidden()

    def convolved(projection, convolution):
        y = projection(x).transpose(1, 2)
        y = conv1d(pad(y, (3, 0)), convolution.weight, groups=len(convolution.weight))
        return silu(y).transpose(1, 2).unflatten(-1, (H, -1))

    q = convolved(layer.q_proj, layer.q_conv1d)
    k = convolved(layer.k_proj, layer.k_conv1d)
    v = convolved(layer.v_proj, layer.v_conv1d)
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    gamma = layer.gamma_proj(x).sigmoid().log() if "forgetting" in options else None
    rule = {"eta": 0.0, "initial_precond": None}
    if options.get("adaptive", True):
        rule = {
            "eta": options.get("eta", 1.0),
            "beta_aware": options.get("beta_aware", False),
            "precond_min": options.get("precond_min"),
            "precond_max": options.get("precond_max"),
            "initial_precond": layer.initial_precond,
        }
    beta, log_alpha = layer.b_proj(x).sigmoid(), None
    if "state_decay" in options:
        log_alpha = -layer.A_log.exp() * softplus(layer.a_proj(x) + layer.dt_bias)
    o, _, _ = online_scaled_delta_rule(
        q, k, v, beta, gamma, log_alpha=log_alpha, backend="reference", **rule
    )
    o = rms_norm(o, (o.shape[-1],), layer.o_norm.weight, 1e-6).flatten(-2)
    if options.get("use_output_gate"):
        o = o * silu(layer.g_proj(x))
    assert_close(layer(x)[0], layer.o_proj(o), 1e-5)


def test_delta_net_is_osdn_without_its_preconditioner():
    osdn, delta_net = build(eta=0.0, learn_initial_precond=False), build(adaptive=False)
    delta_net.load_state_dict(osdn.state_dict())
    assert_close(osdn(hidden())[0], delta_net(hidden())[0], 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("B", [1, 3])
def test_padding_changes_nothing(kind, side, B):
    layer = build(kind, **forgetful(kind))
    lengths = [11, T, 3][:B]
    x, mask = hidden(B), torch.zeros(B, T, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, slice(T - length, T) if side == "left" else slice(length)] = 1
    y = layer(x, attention_mask=mask)[0]
    for row in range(B):
        kept = mask[row].bool()
        assert_close(y[row, kept], layer(x[row, kept][None])[0][0], 1e-5, f"row {row}")


def test_padding_changes_nothing_where_d_starts_outside_its_box():
    """d_1 is learned and may leave the box; the first token would put it back, padding or not."""
    layer, x = build(precond_min=0.9, precond_max=1.1), hidden(1)
    assert layer.initial_precond.max() > 1.1
    mask = torch.cat([torch.zeros(1, 4), torch.ones(1, T)], 1)
    padded = layer(torch.cat([hidden(1, 4), x], 1), attention_mask=mask)[0]
    assert_close(padded[:, 4:], layer(x)[0], 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_do_not_see_each_other(kind):
    layer, x = build(kind, **forgetful(kind)), hidden(1)
    offsets = [0, 1, 3, 4, 12, T]
    y = layer(x, cu_seqlens=torch.tensor(offsets, dtype=torch.int32))[0]
    for start, end in itertools.pairwise(offsets):
        assert_close(y[:, start:end], layer(x[:, start:end])[0], 1e-5, f"{start}:{end}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pieces", [[T], [1] * T, [2, 1, 1, 9, 1, 5], [7, 12]])
def test_a_sequence_in_pieces_is_the_whole(kind, pieces):
    name = "attention" if kind is Attention else "osdn"
    config = OSDNConfig(hidden_size=D, num_heads=H, num_hidden_layers=1, mixer=name)
    layer, x = build(kind, **forgetful(kind)), hidden()
    cache, outputs = DynamicCache(config=config), []
    with torch.no_grad():
        for piece in x.split(pieces, dim=1):
            y, none, returned = layer(piece, past_key_values=cache, use_cache=True)
            assert none is None and returned is cache
            outputs.append(y)
        assert_close(torch.cat(outputs, dim=1), layer(x)[0], 1e-5)


def test_states_stay_float32_in_a_bfloat16_layer():
    layer, x = build(forgetting="data").bfloat16(), hidden().bfloat16()
    config = OSDNConfig(hidden_size=D, num_heads=H, num_hidden_layers=1)
    cache = DynamicCache(config=config)
    with torch.no_grad():
        assert layer(x, past_key_values=cache, use_cache=True)[0].dtype == torch.bfloat16
        layer(x[:, :1], past_key_values=cache, use_cache=True)
    assert {s.dtype for s in cache.layers[0].recurrent_states.values()} == {torch.float32}


def test_bfloat16_autocast_keeps_to_the_fused_norm(recwarn):
    layer = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(hidden())[0]
    assert not [w for w in recwarn if "rms_norm" in str(w.message) or "fused" in str(w.message)]
    assert_close(y, layer(hidden())[0], 2e-2)  # bfloat16 products


@pytest.mark.parametrize("kind", [OSDN, GatedOSDN])
def test_gradients_reach_every_parameter(kind):
    layer = build(kind, forgetting="data", use_output_gate=True, beta_aware=True).train()
    layer(hidden())[0].square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("options", [*VARIANTS, {"forgetting": "data", "state_decay": "data"}])
@pytest.mark.parametrize("watched", ["q_proj", "v_conv1d"])
def test_joined_projections_give_what_separate_ones_give(options, watched, monkeypatch):
    """Outputs and all gradients; a hook on one of them is called, so they are separate again."""
    layer, x, found = build(**options).double().train(), hidden(1).double(), []
    joint, separate = [], []
    run = mixers.short_convolutions
    monkeypatch.setattr(
        mixers, "short_convolutions", lambda *a, **b: joint.append(1) or run(*a, **b)
    )
    offsets = torch.tensor([0, 7, x.shape[1]])
    for count in (1, 0):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y, _, _ = layer(leaf, cu_seqlens=offsets)
        y.square().sum().backward()
        assert (len(joint), len(separate)) == (1, 1 - count)
        found.append({"y": y.detach(), "dx": leaf.grad})
        found[-1] |= {name: p.grad.clone() for name, p in layer.named_parameters()}
        layer.get_submodule(watched).register_forward_hook(lambda *_: separate.append(1))
    for name, value in found[1].items():
        assert_close(found[0][name], value, 1e-12, name)


def test_packed_flash_attention_is_called_as_the_mask_means(monkeypatch):
    """With flash attention's own contract in its place, which no CPU has."""

    def flash(q, k, v, offsets, offsets_k, longest, longest_k, *, window_size):
        assert offsets.dtype == torch.int32 and window_size == (-1, 0)
        assert offsets_k is offsets and longest == longest_k == len(q)
        parts = [
            scaled_dot_product_attention(
                *(x[start:end].transpose(0, 1) for x in (q, k, v)), is_causal=True
            ).transpose(0, 1)
            for start, end in itertools.pairwise(offsets.tolist())
        ]
        return torch.cat(parts)

    torch.manual_seed(0)
    layer, x = Attention(32, 2), torch.randn(1, 21, 32)
    offsets = torch.tensor([0, 4, 5, 21])
    masked = layer(x, cu_seqlens=offsets)[0]
    monkeypatch.setattr(attention, "flash_packs", lambda q: True)
    monkeypatch.setattr(attention, "varlen_attn", flash)
    assert_close(layer(x, cu_seqlens=offsets)[0], masked, 1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_packed_flash_attention_on_a_gpu():
    torch.manual_seed(0)
    layer = Attention(256, 2).cuda()
    x, offsets = torch.randn(1, 300, 256, device="cuda"), torch.tensor([0, 64, 65, 300]).cuda()
    y = layer(x, cu_seqlens=offsets)[0]
    with torch.autocast("cuda", torch.bfloat16):
        packed = layer(x, cu_seqlens=offsets)[0]
    gradients = [torch.autograd.grad(o.float().square().sum(), layer.k_proj.weight)[0]
                 for o in (packed, y)]  # fmt: skip
    assert_close(packed, y, 2e-2)
    assert_close(*gradients, 4e-2)


def test_beta_reaches_two_only_where_it_may():
    x = 40 * hidden()
    assert build()(x)[0].isfinite().all()
    assert build().gates(x)[0].max() <= 1 < build(allow_neg_eigval=True).gates(x)[0].max() <= 2


def test_forgetting_keeps_its_digits_in_bfloat16():
    """log γ near logsigmoid(6.9) ≈ −0.001: the logit itself in bfloat16 would be off by 1.6%."""
    layer = build(forgetting="data")
    torch.nn.init.normal_(layer.gamma_proj.weight, std=0.02)
    torch.nn.init.constant_(layer.gamma_proj.bias, 6.9)
    x = hidden()
    _, exact, _ = layer.gates(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(layer.gates(x)[1], exact, 1e-3)
    assert_close(layer.bfloat16().float().gates(x)[1], exact, 2e-2)  # the bias is rounded itself


def test_the_decay_keeps_its_digits_in_bfloat16():
    """log α = −A softplus(W_a x + dt_bias): the sum and the exponent in bfloat16 would be off."""
    layer, x = build(GatedOSDN), hidden()
    torch.nn.init.normal_(layer.a_proj.weight, std=0.02)
    exact = layer.gates(x)[2]
    with torch.autocast("cpu", torch.bfloat16):
        found = layer.gates(x)[2]
    assert found.dtype == torch.float32
    assert_close(found, exact, 1e-3)


def test_initial_decays_are_mamba_2s():
    """A uniform up to 16 and Δ log-uniform in [1e-3, 0.1], in every head anew."""
    layer = OSDN(512, 512, head_dim=1, state_decay="data")
    A, dt = layer.A_log.exp(), softplus(layer.dt_bias)
    assert 0 < A.min() < 0.5 and 15.5 < A.max() <= 16 and abs(A.mean() - 8) < 1
    assert dt.min() * 1.001 >= 1e-3 and dt.max() <= 0.1 * 1.001
    assert abs(dt.log().mean() - 0.5 * (torch.tensor(1e-3).log() + torch.tensor(0.1).log())) < 0.2


@pytest.mark.parametrize("value", ["always", None, True])
def test_an_unknown_state_decay_is_named(value):
    with pytest.raises(ValueError, match="state_decay: expected 'none' or 'data', got"):
        build(state_decay=value)


def test_a_layer_that_was_saved_before_state_decay_loads():
    """APF's gate had the name that Gated DeltaNet's projection has now."""
    layer = build(forgetting="data")
    torch.nn.init.normal_(layer.gamma_proj.weight)
    weights = {name.replace("gamma_proj", "a_proj"): x for name, x in layer.state_dict().items()}
    fresh = OSDN(D, H, forgetting="data").eval()  # training joins products, which round otherwise
    fresh.load_state_dict(weights)
    assert torch.equal(fresh(hidden())[0], layer(hidden())[0])
    torch.nn.Sequential(OSDN(D, H, forgetting="data")).load_state_dict(
        {f"0.{name}": x for name, x in weights.items()}
    )
    gated = build(GatedOSDN)
    OSDN(D, H, state_decay="data").load_state_dict(gated.state_dict())  # its own a_proj stays


def test_short_convolution_is_causal():
    convolution = ShortConvolution(D, 4)
    x = hidden()
    changed = x.clone()
    changed[:, 10] += 1
    difference = (convolution(changed)[0] - convolution(x)[0]).abs().sum((0, 2)) > 0
    assert difference.nonzero().flatten().tolist() == [10, 11, 12, 13]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"forgetting": "later"}, "forgetting"),
        ({"eta": 3.0}, "eta"),
        ({"precond_min": 0.5}, "both or neither"),
        ({"precond_min": 1.5, "precond_max": 2.0}, "holds 1"),
        ({"precond_min": 0.0, "precond_max": float("inf")}, "^precond_max: expected a finite"),
        ({"eta": "1"}, "^eta: expected a finite number"),
        ({"beta_aware": 1}, "^beta_aware: expected True or False"),
        ({"head_dim": 0}, "^head_dim: expected a positive"),
        ({"head_v_dim": -1}, "^head_v_dim: expected a positive"),
        ({"conv_size": 0}, "^conv_size: expected a positive"),
    ],
)
def test_wrong_options_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        OSDN(D, H, **options)


def test_wrong_calls_are_named():
    layer, x = build(), hidden()
    with pytest.raises(ValueError, match="attention_mask"):
        layer(x, attention_mask=torch.ones(2, T - 1))
    for kind, heads in itertools.product((OSDN, Attention), (5, 0)):
        with pytest.raises(ValueError, match=r"^num_heads: expected a"):
            kind(D, heads)
    with pytest.raises(ValueError, match=r"osdn\.OSDNCache\(model\.config\)"):
        layer(x, past_key_values=DynamicCache(), use_cache=True)
    config = OSDNConfig(hidden_size=D, num_heads=H, num_hidden_layers=1)
    with pytest.raises(ValueError, match="pack or decode"):
        cache = DynamicCache(config=config)
        layer(hidden(1), past_key_values=cache, cu_seqlens=torch.tensor([0, T]))
