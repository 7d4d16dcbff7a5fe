"""The custom operators as PyTorch sees them: opcheck, torch.compile without a break, autocast."""

import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

from osdn.ops import online_scaled_delta_rule, online_scaled_delta_step
from osdn.ops.interface import BACKENDS
from osdn.ops.operands import Operands
from tests.numerics import assert_close, make_inputs
from tests.ops.running import BOX, detached, gradients, outputs

SIZES = {"B": 1, "T": 70, "H": 2, "K": 5, "V": 7}
AWARE_BOX = (0.9, True, BOX["precond_min"], BOX["precond_max"], 0.4)
OFF = (0.0, False, None, None, 0.4)


def arguments(gamma: bool = True, packed: bool = False, grad: bool = True) -> list:
    """The operands of a rule operator, flat."""
    x = make_inputs(**SIZES, sequences=2 if packed else 1, gamma=gamma)
    x = x if grad else detached(x)
    x = {name: x.get(name) for name in Operands._fields[:-1]}
    return [*x.values(), torch.tensor([0, 33, 70]) if packed else None]


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("gamma, rule", [(True, AWARE_BOX), (False, OFF)], ids=["on", "off"])
def test_opcheck_rule(fast_backend, gamma, rule, packed):
    """Schema, fake tensors, autograd registration and AOT dispatch, with and without saving.

    AOT dispatch is checked by comparing every result, what is saved among it, bit by bit with
    eager's.
    """
    operator = BACKENDS[fast_backend].rule
    torch.library.opcheck(operator, (*arguments(gamma, packed, grad=False), *rule, False))
    torch.library.opcheck(operator, (*arguments(gamma, packed), *rule, True))


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("gamma, rule", [(True, AWARE_BOX), (False, OFF)], ids=["on", "off"])
def test_opcheck_backward(fast_backend, gamma, rule, packed):
    tensors = arguments(gamma, packed, grad=False)
    o, S, d, saved = BACKENDS[fast_backend].rule(*tensors, *rule, True)
    operator = getattr(torch.ops.osdn, f"{fast_backend}_backward").default
    cotangents = [torch.randn_like(x) for x in (o, S, d)]
    torch.library.opcheck(operator, (*cotangents, *tensors, *rule, saved))


@pytest.mark.parametrize("gamma, rule", [(True, AWARE_BOX), (False, OFF)], ids=["on", "off"])
def test_opcheck_step(fast_backend, gamma, rule):
    *token, S, d, _ = arguments(gamma, grad=False)
    token = [x if x is None else x[:, 0].contiguous() for x in token]
    torch.library.opcheck(BACKENDS[fast_backend].step, (*token, S, d, None, None, *rule))


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_compiled_rule_and_its_gradient(fast_backend, packed):
    """In one graph, forward and backward; the same bits as without, and again with new values."""
    cu_seqlens = torch.tensor([0, 33, 70]) if packed else None
    options = {"beta_aware": True, "cu_seqlens": cu_seqlens, "backend": fast_backend, **BOX}

    def loss(**x):
        o, S, d = online_scaled_delta_rule(**x, output_final_state=True, **options)
        return (o * o).sum() + (S * S).sum() + (d * d).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        x = make_inputs(**SIZES, sequences=2 if packed else 1, seed=seed)
        plain = torch.autograd.grad(loss(**x), list(x.values()))
        for a, b in zip(torch.autograd.grad(compiled(**x), list(x.values())), plain):
            assert torch.equal(a, b)


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None
    or not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="Inductor needs a C++ compiler and Python's headers",
)
def test_inductor():
    """The compiler that users get, with the rule between two matrix products."""
    x = make_inputs(**SIZES, dtype=torch.float32)
    weight = torch.eye(7, requires_grad=True)

    def loss(v, weight):
        o, _, _ = online_scaled_delta_rule(**(x | {"v": v @ weight}))
        return (o @ weight).square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    leaves = (x["v"], weight)
    plain = torch.autograd.grad(loss(*leaves), leaves)
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), plain):
        assert_close(a, b, 1e-6)


def test_numbers_that_a_graph_does_not_fix():
    """With dynamic=True a second η or scale makes them symbols, which the front door checks."""
    x = detached(make_inputs(**SIZES))

    def rule(eta, scale):
        return online_scaled_delta_rule(**x, eta=eta, scale=scale, backend="chunkwise")[0]

    compiled = torch.compile(rule, fullgraph=True, dynamic=True, backend="eager")
    for numbers in ((1.0, 0.5), (0.7, 0.3), (0.9, 0.2)):
        assert torch.equal(compiled(*numbers), rule(*numbers))


def test_compiled_step(fast_backend):
    """In one graph, in place on both states."""

    def step(token, state, precond):
        o, state, precond = online_scaled_delta_step(
            *token, state=state, precond=precond, backend=fast_backend, **BOX
        )
        return 2 * o

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    *tokens, S, d, _ = arguments(grad=False)
    states, compiled_states = (S.clone(), d.clone()), (S.clone(), d.clone())
    for t in range(3):
        token = [x[:, t] for x in tokens[:5]]  # without a decay of the state
        assert torch.equal(compiled(token, *compiled_states), step(token, *states))
    assert all(torch.equal(a, b) for a, b in zip(compiled_states, states))
    assert not torch.equal(S, states[0]) and not torch.equal(d, states[1])


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_autocast(fast_backend, compiled):
    """q, k and v are rounded to bfloat16, states and gates stay float32, as by hand."""
    x = make_inputs(**SIZES, dtype=torch.float32)
    rule = online_scaled_delta_rule
    if compiled:
        rule = torch.compile(rule, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = rule(**x, output_final_state=True, backend=fast_backend, **BOX)
        actual = torch.autograd.grad(got[0].float().square().sum(), list(x.values()))
    cast = {name: y.bfloat16() if name in ("q", "k", "v") else y for name, y in x.items()}
    want = outputs(cast, fast_backend, **BOX)
    expected = torch.autograd.grad(want["o"].float().square().sum(), list(x.values()))
    assert [y.dtype for y in got] == [torch.bfloat16, torch.float32, torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(got, want.values()))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))
    assert {y.dtype for y in actual} == {torch.float32}


def test_a_second_call_on_the_results_of_the_first(fast_backend):
    """Gradients through both, by way of o and of both states."""
    x = make_inputs(2, 40, 2, 6, 6)

    def twice(backend: str) -> dict:
        o, S, d = outputs(x, backend, **BOX).values()
        second = {"v": o, "initial_state": S, "initial_precond": d}
        return gradients(x, outputs(x | second, backend))

    got, want = twice(fast_backend), twice("reference")
    for name, y in want.items():
        assert_close(got[name], y, 1e-10, name)
