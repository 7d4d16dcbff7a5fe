"""Gradients of every input: against finite differences, and against autograd of the definition."""

from functools import cache

import pytest
import torch
from torch.autograd import forward_ad

from osdn.layers.osdn import OSDN
from osdn.ops import online_scaled_delta_rule
from tests.numerics import assert_close, make_inputs
from tests.ops.running import BOX, assert_all_close, detached, everything, outputs

LENGTHS = (1, 63, 64, 65, 100, 1000)
RULES = {"free": {"eta": 0.9}, "box": BOX, "aware box": {"beta_aware": True, **BOX}}
LOW_PRECISION = [(1, "box"), (65, "free"), (100, "aware box"), (1000, "free"), (1000, "box")]
# Bounds of the relative error against the definition, in float64 on the same inputs; their cause:
# float32: roundings of 2⁻²⁴ in each of T dependent updates, which the erases keep from adding up
# (measured: at most 5e-7 up to T = 1000). bfloat16: both results are rounded to it at the end, and
# float32's error puts a few elements on the other side of a rounding, 2⁻⁸ away (measured: 8e-5).
FLOAT32, BFLOAT16 = 1e-6, 2.0**-10


@cache
def expected(T: int, name: str, dtype: torch.dtype = torch.float64) -> dict:
    """What the definition gives for the inputs that `compare` uses."""
    return everything(inputs_of(T, dtype), "reference", **RULES[name])


def inputs_of(T: int, dtype: torch.dtype = torch.float64) -> dict:
    """More features than a vector of the numba backend has lanes, and a part of one left over."""
    return make_inputs(2, T, 2, 20, 37, dtype=dtype, seed=T)


@pytest.mark.parametrize("aware", [False, True], ids=["", "aware"])
@pytest.mark.parametrize("box", [{}, BOX], ids=["free", "box"])
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_gradcheck(backend, aware, box, packed):
    """All seven inputs, through o and both final states, K ≠ V."""
    lengths = {"sequences": 2} if packed else {}
    inputs = make_inputs(1, 7, 2, 3, 2, unit_keys=False, seed=4, **lengths)
    inputs["k"] = (2 * inputs["k"].detach()).requires_grad_()
    cu_seqlens = torch.tensor([0, 3, 7]) if packed else None

    def run(*tensors):
        named = dict(zip(inputs, tensors))
        options = {"beta_aware": aware, "cu_seqlens": cu_seqlens, **box}
        return tuple(outputs(named, backend, eta=0.7, **options).values())

    assert torch.autograd.gradcheck(run, tuple(inputs.values()), fast_mode=False)


def test_the_box_here_clips():
    """'Clip active' is true of what is compared: both bounds are hit, and some d is free."""
    d = torch.stack([outputs(inputs_of(T), "reference", **BOX)["final_precond"] for T in (5, 100)])
    low, high = (d == BOX["precond_min"]).double(), (d == BOX["precond_max"]).double()
    assert min(low.mean(), high.mean(), (1 - low - high).mean()) > 0.05


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("T", LENGTHS)
def test_everything_equals_the_definition(fast_backend, T, name):
    got = everything(inputs_of(T), fast_backend, **RULES[name])
    assert_all_close(got, expected(T, name), 1e-10)


@pytest.mark.parametrize("T, name", LOW_PRECISION)
def test_float32(fast_backend, T, name):
    got = everything(inputs_of(T, torch.float32), fast_backend, **RULES[name])
    assert {x.dtype for x in got.values()} == {torch.float32}
    assert_all_close(got, expected(T, name, torch.float32), FLOAT32)


@pytest.mark.parametrize("T, name", LOW_PRECISION)
def test_bfloat16(fast_backend, T, name):
    """Inputs of bfloat16, states and gates of float32: results of bfloat16 alone are rounded."""
    got = everything(inputs_of(T, torch.bfloat16), fast_backend, **RULES[name])
    for key, x in expected(T, name, torch.bfloat16).items():
        rounded = key in ("o", "dq", "dk", "dv")
        assert got[key].dtype == (torch.bfloat16 if rounded else torch.float32), key
        assert_close(got[key], x, BFLOAT16 if rounded else FLOAT32, key)


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (1.0, 2.0), (1.0, 1.0)])
def test_the_clip_lets_gradient_through_at_exactly_the_bound(backend, low, high):
    """K = 1, k = d = 1: x = 0, so u = 1 is on the bound; ∂d_2/∂d_1 = 1 − η as for torch.clamp."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    d = torch.ones(1, 1, 1, dtype=torch.float64, requires_grad=True)
    box = {"eta": 0.25, "precond_min": low, "precond_max": high, "initial_precond": d}
    *_, final = online_scaled_delta_rule(
        one, one, one, one[..., 0], output_final_state=True, backend=backend, **box
    )
    assert torch.autograd.grad(final.sum(), d)[0].item() == 0.75


@pytest.mark.parametrize("low, high", [(0.0, 1 - 1e-9), (1 + 1e-9, 2.0)])
def test_the_clip_stops_the_gradient_beyond_the_bound(backend, low, high):
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    d = torch.ones(1, 1, 1, dtype=torch.float64, requires_grad=True)
    box = {"eta": 0.25, "precond_min": low, "precond_max": high, "initial_precond": d}
    *_, final = online_scaled_delta_rule(
        one, one, one, one[..., 0], output_final_state=True, backend=backend, **box
    )
    assert torch.autograd.grad(final.sum(), d)[0].item() == 0.0


@pytest.mark.parametrize("used", ["o", "final_state", "final_precond"])
def test_only_one_result_used(fast_backend, used):
    """The gradients of one result alone, which autograd hands on without the others' cotangents."""
    x = make_inputs(2, 70, 2, 5, 7)
    want = torch.autograd.grad(outputs(x, "reference")[used].sum(), list(x.values()),
                               allow_unused=True, materialize_grads=True)  # fmt: skip
    got = torch.autograd.grad(outputs(x, fast_backend)[used].sum(), list(x.values()))
    for name, a, b in zip(x, got, want):
        assert_close(a, b, 1e-10, name)


@pytest.mark.parametrize("wanted", ["q", "beta", "log_gamma", "initial_precond"])
def test_only_one_input_wants_a_gradient(fast_backend, wanted):
    x = make_inputs(2, 70, 2, 5, 7)
    for name, y in x.items():
        y.requires_grad_(name == wanted)
    got, want = everything(x, fast_backend), everything(x, "reference")
    assert_all_close(got, want, 1e-10)


def test_defaults_and_one_preconditioner_for_all(fast_backend):
    """No γ, no state, initial_precond [H, K] shared by sequences: its gradient sums over them."""
    x = make_inputs(3, 70, 2, 5, 7, gamma=False)
    del x["log_gamma"], x["initial_state"]
    x["initial_precond"] = x["initial_precond"][0].detach().requires_grad_()
    assert_all_close(everything(x, fast_backend), everything(x, "reference"), 1e-10)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_constant_preconditioner_has_its_gradient(fast_backend, eta):
    """With η = 0 and no γ phase 1 is left out; initial_precond still scales every write."""
    x = make_inputs(2, 130, 2, 5, 7, gamma=False)
    got, want = (everything(x, b, eta=eta) for b in (fast_backend, "reference"))
    assert_all_close(got, want, 1e-10)


def test_second_derivatives(backend):
    """The definition has them; a fast backend says that it has none, which 0 would hide."""
    x = detached(make_inputs(1, 4, 1, 3, 2))
    v = x.pop("v")

    def loss(v):
        return online_scaled_delta_rule(v=v, **x, backend=backend)[0].square().sum()

    def linear(v):
        return online_scaled_delta_rule(v=v, **x, backend=backend)[0].sum()

    if backend == "reference":
        hessian = torch.autograd.functional.hessian(loss, v).view(v.numel(), -1)
        f = [loss(w).item() for w in (v, v + 1, v - 1)]  # a quadratic in v
        assert hessian.sum().item() == pytest.approx(f[1] + f[2] - 2 * f[0])
        return
    for f in (loss, linear):
        with pytest.raises(RuntimeError, match=f"'{backend}', .* can be differentiated once"):
            torch.autograd.functional.hessian(f, v)


def test_a_first_derivative_with_a_graph(fast_backend):
    """create_graph alone is no second derivative."""
    x = make_inputs(1, 4, 1, 3, 2)
    loss = online_scaled_delta_rule(**x, backend=fast_backend)[0].sum()
    plain, kept = (
        torch.autograd.grad(loss, list(x.values()), retain_graph=True, create_graph=create)
        for create in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, kept))


def test_layouts_other_than_contiguous(fast_backend):
    """Heads before time, gates spread by expand, strided halves, a cotangent that is one number."""
    x = make_inputs(2, 70, 3, 6, 7)
    plain = {name: y.detach() for name, y in x.items()}
    plain["beta"] = plain["beta"][..., :1].expand(2, 70, 3)
    plain["initial_precond"] = plain["initial_precond"][:1].expand(2, 3, 6)
    odd = {
        "q": plain["q"].transpose(1, 2).contiguous().transpose(1, 2),
        "k": torch.stack([plain["k"]] * 2, -1)[..., 0],
        "v": torch.cat([plain["v"], plain["v"]], -1)[..., :7],
        "beta": plain["beta"],
        "log_gamma": plain["log_gamma"].mT.contiguous().mT,
        "initial_state": plain["initial_state"].mT.contiguous().mT,
        "initial_precond": plain["initial_precond"],
    }
    assert not any(y.is_contiguous() for y in odd.values())
    results = []
    for named, backend in ((plain, "reference"), (odd, fast_backend)):
        leaves = {name: y.detach().requires_grad_() for name, y in named.items()}
        o, S, d = outputs(leaves, backend, **BOX).values()
        gradients = torch.autograd.grad(o.sum() + S.sum() + d.sum(), list(leaves.values()))
        results.append({"o": o, "S": S, "d": d} | dict(zip(leaves, gradients)))
    assert_all_close(results[1], results[0], 1e-10)


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda q: f(q).sum())(x),
    "vmap": lambda f, x: torch.vmap(f)(x[None]),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_are_refused_where_they_would_be_lost(fast_backend, transform):
    x = torch.rand(1, 5, 2, 3)
    run = lambda q: online_scaled_delta_rule(q, x, x, x[..., 0], backend=fast_backend)[0]  # noqa: E731
    with pytest.raises(ValueError, match="use backend='reference'"):
        transform(run, x)


def test_forward_mode_is_refused_where_it_would_be_lost(fast_backend):
    x = torch.rand(1, 5, 2, 3)
    with forward_ad.dual_level(), pytest.raises(ValueError, match="k: expected no forward-mode"):
        dual = forward_ad.make_dual(x, x)
        online_scaled_delta_rule(x, dual, x, x[..., 0], backend=fast_backend)


def test_a_layer_on_the_reference_takes_forward_mode():
    """Against reverse mode, in the hidden states and the convolutions' weights."""
    torch.manual_seed(0)
    layer, x = OSDN(8, 2).double(), torch.randn(1, 5, 8, dtype=torch.float64)
    layer.backend = "reference"
    weights = {name: p.detach() for name, p in layer.named_parameters() if "conv" in name}
    run = lambda x, w: torch.func.functional_call(layer, w, (x,))[0].square().sum()  # noqa: E731
    value, along = torch.func.jvp(run, (x, weights), (x, weights))
    dx, dweights = torch.func.grad(run, (0, 1))(x, weights)
    expected = (dx * x).sum() + sum((dweights[name] * w).sum() for name, w in weights.items())
    assert_close(along, expected, 1e-6)  # the gates are float32
    assert_close(torch.vmap(lambda x: run(x, weights))(x[None])[0], value, 1e-6)
