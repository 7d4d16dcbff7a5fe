"""Statements 1 to 6 and 20: identities to rounding, bounds without a violation, tightness."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from osdn.ops import online_scaled_delta_rule
from tests.numerics import assert_close
from tests.theory.instances import (
    BATCH,
    PROPERTY,
    Draw,
    boxes,
    etas,
    families,
    holds,
    seeds,
    shapes,
)
from theory.bounds import (
    comparator_bound,
    contraction_identity,
    decayed_write,
    distance_identity,
    precond_path,
    unit_key_bound,
    unit_key_product,
    write_key_scaling,
)
from theory.experiments import hardest_keys


@PROPERTY
@given(seeds, shapes, families)
def test_a_preconditioned_step_is_a_scaled_write_key(seed, shape, family):
    draw = Draw(seed, *shape)
    k, v = 3 * draw.keys(family)[:, 0], draw.normal(BATCH, 5)
    S, d, beta = draw.normal(BATCH, draw.K, 5), draw.normal(BATCH, draw.K), 2 * draw.uniform(BATCH)
    assert_close(*write_key_scaling(S, d, k, v, beta), 1e-13)
    # The gradient in the statement is autograd's, not only ours.
    memory = S.clone().requires_grad_()
    (0.5 * (torch.einsum("bkv,bk->bv", memory, k) - v).square().sum()).backward()
    step = S - beta[:, None, None] * d[:, :, None] * memory.grad
    assert_close(write_key_scaling(S, d, k, v, beta).left, step, 1e-13)
    # The identity's rounding is relative to the loss before the write.
    left, right = contraction_identity(S, d, k, v, beta)
    scale = contraction_identity(S, 0 * d, k, v, beta).left * (1 + 9 * d.abs().amax(-1)) ** 2
    assert ((left - right).abs() <= 1e-12 * scale.clamp_min(1)).all()


@PROPERTY
@given(seeds, shapes, families)
def test_a_write_after_a_decay_is_bounded_by_the_residual_before_it(seed, shape, family):
    draw = Draw(seed, *shape)
    k, v = draw.keys(family)[:, 0], draw.normal(BATCH, 5)
    S, d, beta = draw.normal(BATCH, draw.K, 5), draw.normal(BATCH, draw.K), 2 * draw.uniform(BATCH)
    alpha = draw.uniform(BATCH)
    written, identity, bound = decayed_write(S, d, k, v, beta, alpha)
    one = [x[:, None, None] for x in (k, k, v, beta, alpha)]
    _, state, _ = online_scaled_delta_rule(
        *one[:4], log_alpha=one[4].log(), initial_state=S[:, None], initial_precond=d[:, None],
        output_final_state=True, backend="reference",
    )  # fmt: skip
    assert_close(state[:, 0], written, 1e-12)  # the write is the operator's
    scale = (1 + 9 * d.abs().amax(-1)) ** 2 * (1 + 0 * identity.left)
    assert ((identity.left - identity.right).abs() <= 1e-11 * scale * (1 + identity.right)).all()
    holds(*bound, rounding=1e-10)


def test_a_pair_written_after_decays_keeps_a_residual():
    """Both inequalities of the statement are equalities from S = 0, with r and α constant."""
    k = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    v = 5 * k
    d = torch.ones(1, 2).double()
    beta, alpha = torch.tensor([[0.7], [0.9]], dtype=torch.float64)
    S = torch.zeros(1, 2, 2).double()
    for _ in range(100):
        S, _, bound = decayed_write(S, d, k, v, beta, alpha)
        assert_close(*bound, 1e-12)
    r, a = 1 - beta.item(), alpha.item()
    assert bound.left.item() == pytest.approx(r * (1 - a) * 5 / (1 - r * a), rel=1e-9)


def test_the_path_is_the_operators():
    draw = Draw(3, 30, 6)
    k, beta, log_gamma = draw.keys("dense"), draw.uniform(BATCH, 30), -0.1 * draw.uniform(BATCH, 30)
    d1 = draw.inside((0.0, 2.0), BATCH, 6)
    options = {"eta": 0.7, "beta_aware": True}
    path = precond_path(k, d1, beta, log_gamma, box=(0.5, 1.5), **options)
    one = k[:, :, None]
    _, _, d = online_scaled_delta_rule(
        one, one, one, beta[..., None], log_gamma[..., None], initial_precond=d1[:, None],
        precond_min=0.5, precond_max=1.5, output_final_state=True, backend="reference", **options,
    )  # fmt: skip
    assert_close(path.d[:, -1], d[:, 0], 1e-13)
    x = 1 - beta * (path.d[:, :-1] * k * k).sum(-1)
    assert_close(path.x, x, 1e-13)


@PROPERTY
@given(seeds, shapes, families, etas, boxes)
def test_unit_key_bound(seed, shape, family, eta, box):
    draw = Draw(seed, *shape)
    k, d1 = (
        draw.keys(family),
        1 + draw.normal(BATCH, draw.K) * 10 ** (4 * draw.uniform(BATCH, 1) - 3),
    )
    holds(*unit_key_bound(k, d1, eta=eta, box=box), rounding=1e-20)
    holds(*unit_key_product(k, d1, eta=eta, box=box), rounding=1e-9)
    left, right = distance_identity(k, d1, eta=eta)
    # d is stored to 1e-16, so a squared distance D is known to 1e-16 √D, and to 1e-16 D.
    distance = (d1 - 1).norm(dim=-1)
    assert ((left - right).abs() <= 1e-13 * (distance + distance.square())).all()


@pytest.mark.parametrize("eta", [0.01, 0.5, 1.0, 1.7, 1.99])
def test_unit_key_bound_is_attained(eta):
    """One one-hot key for ever: x_t = −(1 − η)^{t−1} δ, whose squares sum to the bound."""
    k = torch.zeros(1, 3000, 2, dtype=torch.float64)
    k[..., 0] = 1
    left, right = unit_key_bound(k, torch.tensor([[1.4, 1.0]], dtype=torch.float64), eta=eta)
    assert 0.9999 < (left / right).item() <= 1 + 1e-9


def test_product_is_attained():
    """T one-hot keys on T coordinates, equal errors, η = 1: both inequalities are equalities."""
    k, d1 = torch.eye(9, dtype=torch.float64), torch.full((9,), 0.7, dtype=torch.float64)
    left, right = unit_key_product(k, d1, eta=1.0)
    assert math.isclose(left.item(), right.item(), rel_tol=1e-12)


@pytest.mark.parametrize(("eta", "T", "share"), [(0.05, 4000, 0.98), (1.0, 300, 0.66)])
def test_the_super_geometric_rate_is_attained_with_two_features(eta, T, share):
    """T far above K, keys chosen against d: Π x² is (share)^T of its bound, share by Statement 5.

    (2 − η)/(2 − η/2), less a little: the last few tokens have nothing left to spend.
    """
    d1 = torch.tensor([1.5, 0.5], dtype=torch.float64)
    left, right = unit_key_product(hardest_keys(d1, T, eta=eta), d1, eta=eta)
    assert share < math.exp((left - right).item() / T) <= 1


@PROPERTY
@given(seeds, shapes, families, st.floats(1e-3, 1.9), boxes, st.booleans())
def test_comparator_bound(seed, shape, family, eta, box, beta_aware):
    draw = Draw(seed, *shape)
    k = draw.keys(family) * 1.1 * draw.uniform(BATCH, draw.T, 1) ** 0.3
    beta = 1.2 * draw.uniform(BATCH, draw.T)
    d1, u = 3 * draw.normal(BATCH, draw.K), draw.inside(box, BATCH, draw.K)
    options = {"eta": eta, "beta_aware": beta_aware, "box": box}
    best = comparator_bound(k, d1, u, beta, **options)
    holds(*best)
    for lam in (0.01, 0.3, 1.0, 1.9):
        given_lambda = comparator_bound(k, d1, u, beta, lam=lam, **options)
        holds(*given_lambda)
        assert (best.right <= given_lambda.right * (1 + 1e-9)).all()


def test_comparator_bound_is_attained():
    """η → 0 from d_1 = u: x = y and the bound tends to Σ y². And it is the unit-key bound at 1."""
    draw = Draw(5, 30, 4)
    k, u = 0.8 * draw.keys("dense"), draw.inside((0.0, 2.0), BATCH, 4)
    left, right = comparator_bound(k, u, u, eta=1e-6)
    assert (left / right).min() > 0.999
    unit, d1 = draw.keys("one-hot"), draw.normal(BATCH, 4)
    ours = comparator_bound(unit, d1, torch.ones_like(d1), eta=0.6).right
    assert_close(ours, unit_key_bound(unit, d1, eta=0.6).right, 1e-12)


def test_what_the_proofs_need_is_needed():
    """Without γ = 1, or with the comparator outside the box, the sums pass every bound."""
    k, d1 = torch.zeros(400, 2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    k[:, 0] = 1
    forgetting = torch.full((400,), 0.9, dtype=torch.float64).log()
    x = precond_path(k, d1, None, forgetting, eta=0.5).x
    assert x.square().sum() > 5  # the bound would be 0: d_1 is the comparator
    # The fixed point of one one-hot key: x = (1 − γ)/(1 − γ + η).
    assert math.isclose(x[-1].item(), 0.1 / 0.6, rel_tol=1e-9)
    x = precond_path(k, 2 * d1, eta=0.5, box=(2.0, 3.0)).x
    assert x.square().sum() == 400  # the bound for u = 1 would be 4/3
    with pytest.raises(ValueError, match="the comparator 1"):
        unit_key_bound(k, 2 * d1, eta=0.5, box=(2.0, 3.0))
    with pytest.raises(ValueError, match="unit keys"):
        unit_key_bound(0.5 * k, d1, eta=0.5)
    with pytest.raises(ValueError, match="eta"):
        unit_key_bound(k, d1, eta=2.0)


def test_bias_of_forgetting():
    """Flat keys, s = 1/K: constant γ < 1 settles at d = η/(η + (1 − γ)K), not at 0."""
    K, gamma, eta = 16, 0.99, 0.5
    k = torch.full((4000, K), K**-0.5, dtype=torch.float64)
    log_gamma = torch.full((4000,), math.log(gamma), dtype=torch.float64)
    d = precond_path(k, torch.ones(K, dtype=torch.float64), None, log_gamma, eta=eta).d
    assert_close(d[-1], torch.full((K,), eta / (eta + (1 - gamma) * K), dtype=torch.float64), 1e-9)
