"""One token at a time: equal to the rule, in place, and as strict about its arguments."""

import pytest
import torch

from osdn.ops import online_scaled_delta_step
from tests.numerics import assert_close, make_inputs
from tests.ops.running import BOX, detached, outputs

RULES = {"plain": {}, "aware box": {"beta_aware": True, **BOX}, "off": {"eta": 0.0}}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_step_by_step_equals_the_rule(backend, rule, dtype):
    x = detached(make_inputs(2, 30, 3, 20, 37, dtype=dtype, gamma="eta" not in rule))
    whole = outputs(x, "reference", **rule)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 2.0**-9}[dtype]
    state, precond = (
        x[name].to(accumulate).clone() for name in ("initial_state", "initial_precond")
    )
    for t in range(30):
        token = [None if x[name] is None else x[name][:, t]
                 for name in ("q", "k", "v", "beta", "log_gamma")]  # fmt: skip
        o, *after = online_scaled_delta_step(
            *token, state=state, precond=precond, backend=backend, **rule
        )
        assert after[0] is state and after[1] is precond and o.dtype == dtype
        assert_close(o, whole["o"][:, t], tolerance, f"o at {t}")
    assert_close(state, whole["final_state"], min(tolerance, 2e-6))
    assert_close(precond, whole["final_precond"], min(tolerance, 2e-6))


def test_autograd_hears_of_the_change(backend):
    """A state that a graph has saved may not change behind its back."""
    x = detached(make_inputs(1, 1, 2, 4, 6))
    token = [x[name][:, 0] for name in ("q", "k", "v", "beta", "log_gamma")]
    state, precond = (x[name].clone() for name in ("initial_state", "initial_precond"))
    weight = torch.ones(1, requires_grad=True, dtype=torch.float64)
    loss = (weight * state).sum()
    online_scaled_delta_step(*token, state=state, precond=precond, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode(backend):
    x = detached(make_inputs(1, 1, 2, 4, 6))
    with torch.inference_mode():
        token = [x[name][:, 0] for name in ("q", "k", "v", "beta", "log_gamma")]
        state, precond = (x[name].clone() for name in ("initial_state", "initial_precond"))
        o, *_ = online_scaled_delta_step(*token, state=state, precond=precond, backend=backend)
    want = outputs(x, "reference")
    assert_close(o, want["o"][:, 0], 1e-10)
    assert_close(state, want["final_state"], 1e-10)


def test_slots_of_a_pool(backend):
    """As each sequence alone, and nothing else in the pool changes; a negative slot is empty."""
    x = detached(make_inputs(3, 1, 2, 16, 24))
    token = [x[name][:, 0] for name in ("q", "k", "v", "beta", "log_gamma")]
    g = torch.Generator().manual_seed(3)
    pool = torch.randn(5, 2, 16, 24, generator=g, dtype=torch.float64)
    preconds = torch.rand(5, 2, 16, generator=g, dtype=torch.float64)
    state, precond = pool.clone(), preconds.clone()
    o, *after = online_scaled_delta_step(
        *token, state=state, precond=precond, slots=torch.tensor([4, -1, 0]), backend=backend
    )
    assert after[0] is state and after[1] is precond
    for i, slot in ((0, 4), (2, 0)):
        S, d = pool[slot : slot + 1].clone(), preconds[slot : slot + 1].clone()
        alone = [t[i : i + 1] for t in token]
        expected, *_ = online_scaled_delta_step(*alone, state=S, precond=d, backend=backend)
        for actual, wanted in ((o[i], expected[0]), (state[slot], S[0]), (precond[slot], d[0])):
            assert_close(actual, wanted, 1e-12)
    assert torch.equal(state[1:4], pool[1:4]) and torch.equal(precond[1:4], preconds[1:4])


def test_a_pool_with_every_place_empty(backend):
    x = detached(make_inputs(1, 1, 2, 4, 6))
    token = [x[name][:, 0] for name in ("q", "k", "v", "beta", "log_gamma")]
    state, precond = (x[name].clone() for name in ("initial_state", "initial_precond"))
    o, *_ = online_scaled_delta_step(
        *token, state=state, precond=precond, slots=torch.tensor([-1]), backend=backend
    )
    assert o.shape == (1, 2, 6)
    assert torch.equal(state, x["initial_state"]) and torch.equal(precond, x["initial_precond"])


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape)


def one_token() -> dict:
    """A correct call: B = 2, H = 3, K = 4, V = 6."""
    token = {"q": zeros(2, 3, 4), "k": zeros(2, 3, 4), "v": zeros(2, 3, 6), "beta": zeros(2, 3)}
    return token | {"state": zeros(2, 3, 4, 6), "precond": zeros(2, 3, 4)}


REFUSED_STEP = {
    "rank": (
        {"q": zeros(2, 1, 3, 4)},
        "q: expected 3 dimensions [B, H, K], got shape (2, 1, 3, 4)",
    ),
    "k": ({"k": zeros(2, 3, 5)}, "k: expected shape (2, 3, 4) (like q), got (2, 3, 5)"),
    "beta": ({"beta": zeros(3, 2)}, "beta: expected shape (2, 3) ([B, H]), got (3, 2)"),
    "state": ({"state": zeros(2, 3, 6, 4)}, "state: expected shape (2, 3, 4, 6) ([B, H, K, V])"),
    "precond": ({"precond": zeros(3, 4)}, "precond: expected shape (2, 3, 4) ([B, H, K])"),
    "state dtype": (
        {"state": zeros(2, 3, 4, 6).double()},
        "state: expected a torch.float32 tensor whose places along dimension 0 are each contiguous",
    ),
    "layout": ({"state": zeros(2, 3, 6, 4).mT}, "with strides (72, 24, 1, 4)"),
    "gradient": ({"k": zeros(2, 3, 4).requires_grad_()}, "expected tensors that need no gradient"),
    "aware": ({"beta_aware": 1}, "beta_aware: expected True or False, got 1"),
    "slots kind": ({"slots": [0, 1]}, "slots: expected a tensor, got list"),
    "slots dtype": ({"slots": zeros(2)}, "slots: expected int32 or int64 on cpu like q"),
    "slots shape": (
        {"slots": torch.tensor([0, 1, 1])},
        "slots: expected shape (2,) ([B]), got (3,",
    ),
    "slots place": (
        {"slots": torch.tensor([-1, 2])},
        "slots: expected places less than P = 2 of the pool, got 2",
    ),
    "slots twice": (
        {"slots": torch.tensor([1, 1])},
        "slots: expected distinct places, got 1 more than once",
    ),
    "slots pool": (
        {"slots": torch.tensor([0, 1]), "state": torch.tensor(0.0)},
        "state: expected 4 dimensions [P, H, K, V], got shape ()",
    ),
    "eta": ({"eta": 3.0}, "eta: expected a step size in [0, 2], got 3.0"),
}


@pytest.mark.parametrize("change, message", REFUSED_STEP.values(), ids=REFUSED_STEP.keys())
def test_step_names_bad_arguments(change, message):
    online_scaled_delta_step(**one_token())
    with pytest.raises(ValueError) as error:
        online_scaled_delta_step(**(one_token() | change))
    assert message in str(error.value)
