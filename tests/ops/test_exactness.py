"""What must hold exactly (docs/explanation/operator.md), for every backend, in float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.numerics import assert_close, make_inputs
from tests.ops.running import (
    BOX,
    assert_all_close,
    delta_rule,
    detached,
    everything,
    gradients,
    outputs,
)

EXACT = 1e-10
RULES = {
    "plain": {},
    "aware": {"beta_aware": True},
    "box": BOX,
    "aware box": {"beta_aware": True, **BOX},
}
properties = settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=RULES.values(), ids=RULES.keys())
def rule(request) -> dict:
    return request.param


def tokens(inputs: dict, start: int, end: int) -> dict:
    """The inputs of tokens start to end, without the states."""
    per_token = ("q", "k", "v", "beta", "log_gamma")
    return {name: x[:, start:end] for name, x in inputs.items() if name in per_token}


def test_eta_0_from_ones_is_the_delta_rule(backend):
    x = detached(make_inputs(2, 70, 2, 6, 9, gamma=False))
    expected = delta_rule(x["q"], x["k"], x["k"], x["v"], x["beta"], x["initial_state"], 6**-0.5)
    del x["initial_precond"]
    got = outputs(x, backend, eta=0.0)
    assert_close(got["o"], expected[0], EXACT)
    assert_close(got["final_state"], expected[1], EXACT)
    assert torch.equal(got["final_precond"], torch.ones(2, 2, 6, dtype=torch.float64))


def test_eta_and_the_length_of_keys_are_one_scale(backend, rule):
    x, c = detached(make_inputs(2, 70, 2, 6, 9, gamma=True)), 1.3
    kept = outputs(x, backend, eta=0.9, **rule)
    box = {name: rule[name] / c**2 for name in rule.keys() & BOX.keys()}
    scaled = {
        **x,
        "k": c * x["k"],
        "initial_precond": x["initial_precond"] / c**2,
        "initial_state": x["initial_state"] / c,
    }
    got = outputs(scaled, backend, eta=0.9 / c**4, **{**rule, **box})
    for name, power in (("o", 1), ("final_state", 1), ("final_precond", 2)):
        assert_close(c**power * got[name], kept[name], EXACT)


def test_eta_0_from_p_is_the_delta_rule_with_write_key_p_k(backend):
    x = detached(make_inputs(2, 70, 2, 6, 9, gamma=False))
    write_key = x["initial_precond"][:, None] * x["k"]
    expected = delta_rule(x["q"], x["k"], write_key, x["v"], x["beta"], x["initial_state"], 0.3)
    got = outputs(x, backend, eta=0.0, scale=0.3)
    assert_close(got["o"], expected[0], EXACT)
    assert_close(got["final_state"], expected[1], EXACT)
    assert torch.equal(got["final_precond"], x["initial_precond"])


@pytest.mark.parametrize("box", [{}, {"precond_min": 0.0, "precond_max": 2.0}])
def test_unit_keys_from_ones_are_the_delta_rule_at_any_eta(backend, box):
    x = detached(make_inputs(2, 130, 2, 6, 9, gamma=False))
    expected = delta_rule(x["q"], x["k"], x["k"], x["v"], x["beta"], x["initial_state"], 6**-0.5)
    x["initial_precond"] = torch.ones(2, 6, dtype=torch.float64)
    got = outputs(x, backend, eta=1.7, **box)
    assert_close(got["o"], expected[0], EXACT)
    assert_close(got["final_state"], expected[1], EXACT)
    assert_close(got["final_precond"], torch.ones(2, 2, 6), EXACT)


def test_residual_ratio_depends_on_keys_and_gates_alone(backend, rule):
    """f_t(S_t) = (1 − β⟨d, s⟩)² f_t(S_{t−1}) at every token, for any S, v and length of keys."""
    x = detached(make_inputs(2, 12, 2, 6, 9, unit_keys=False, seed=3))
    S, d = 5 * x["initial_state"], x["initial_precond"]
    for t in range(12):
        token = tokens(x, t, t + 1)
        k, v, beta = (token[name][:, 0] for name in ("k", "v", "beta"))

        def residual(S, k=k, v=v):
            return (v - torch.einsum("bhkv,bhk->bhv", S, k)).pow(2).sum(-1) / 2

        got = outputs(token | {"initial_state": S, "initial_precond": d}, backend, **rule)
        ratio = (1 - beta * (d * k * k).sum(-1)) ** 2
        assert_close(residual(got["final_state"]), ratio * residual(S), EXACT, f"token {t}")
        S, d = got["final_state"], got["final_precond"]


@properties
@given(split=st.integers(1, 149), seed=st.integers(0, 99))
def test_two_pieces_equal_the_whole(backend, rule, split, seed):
    x = detached(make_inputs(2, 150, 2, 6, 9, seed=seed))
    whole = outputs(x, backend, **rule)
    head = outputs({**x, **tokens(x, 0, split)}, backend, **rule)
    carried = {
        "initial_state": head["final_state"],
        "initial_precond": head["final_precond"],
    }
    tail = outputs(tokens(x, split, 150) | carried, backend, **rule)
    assert_close(torch.cat([head["o"], tail["o"]], 1), whole["o"], EXACT)
    assert_close(tail["final_state"], whole["final_state"], EXACT)
    assert_close(tail["final_precond"], whole["final_precond"], EXACT)


@properties
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_packing_equals_separate_runs(backend, rule, lengths, seed):
    """Outputs, final states and every gradient."""
    ends = [sum(lengths[: n + 1]) for n in range(len(lengths))]
    x = make_inputs(1, ends[-1], 2, 5, 7, sequences=len(lengths), seed=seed)
    cu_seqlens = torch.tensor([0, *ends])
    packed = everything(x, backend, cu_seqlens=cu_seqlens, **rule)
    o, S, d = [], [], []
    for n, (start, end) in enumerate(zip([0, *ends], ends)):
        states = {name: x[name][n : n + 1] for name in ("initial_state", "initial_precond")}
        run = outputs(tokens(x, start, end) | states, backend, **rule)
        for parts, name in ((o, "o"), (S, "final_state"), (d, "final_precond")):
            parts.append(run[name])
    separate = {
        "o": torch.cat(o, 1), "final_state": torch.cat(S), "final_precond": torch.cat(d)
    }  # fmt: skip
    assert_all_close(packed, separate | gradients(x, separate), EXACT)


@properties
@given(order=st.permutations(range(6)), seed=st.integers(0, 99))
def test_permuting_key_features_permutes_d_and_leaves_o(backend, rule, order, seed):
    x = detached(make_inputs(2, 70, 2, 6, 9, seed=seed))
    base = outputs(x, backend, **rule)
    moved = {name: x[name][..., order] for name in ("q", "k", "initial_precond")}
    moved["initial_state"] = x["initial_state"][:, :, order]
    got = outputs({**x, **moved}, backend, **rule)
    assert_close(got["o"], base["o"], EXACT)
    assert_close(got["final_state"], base["final_state"][:, :, order], EXACT)
    assert_close(got["final_precond"], base["final_precond"][..., order], EXACT)


@properties
@given(at=st.lists(st.integers(0, 59), min_size=1, max_size=30), seed=st.integers(0, 99))
def test_padding_tokens_change_nothing(backend, rule, at, seed):
    """A token with k = 0, β = 0 and log γ = 0 wherever it stands; its q and v do not matter.

    Given that d starts inside the box: the clip of a padding token would move it there.
    """
    x = detached(make_inputs(2, 60, 2, 6, 9, seed=seed))
    if "precond_min" in rule:
        x["initial_precond"] = x["initial_precond"].clamp(rule["precond_min"], rule["precond_max"])
    base = outputs(x, backend, **rule)
    padded, kept = {}, torch.ones(60 + len(at), dtype=torch.bool)
    for i, t in enumerate(sorted(at)):
        kept[t + i] = False
    for name in ("q", "k", "v", "beta", "log_gamma"):
        padded[name] = torch.full((2, len(kept), *x[name].shape[2:]), 3.0, dtype=torch.float64)
        if name in ("k", "beta", "log_gamma"):
            padded[name].zero_()
        padded[name][:, kept] = x[name]
    got = outputs({**x, **padded}, backend, **rule)
    assert_close(got["o"][:, kept], base["o"], EXACT)
    assert_close(got["final_state"], base["final_state"], EXACT)
    assert_close(got["final_precond"], base["final_precond"], EXACT)
