"""Statements 7 to 10: the full batch, right-Newton, and when a diagonal comparator suffices."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.numerics import assert_close
from tests.theory.instances import BATCH, PROPERTY, Draw, holds, seeds
from theory.convergence import (
    curvature_bound,
    diagonal_comparator,
    full_batch_bound,
    gap,
    gradient_descent_steps,
    hypergradient_descent,
    hypergradient_step,
    newton_step,
    ratio,
)


def covariance(draw: Draw, decades: float, rank: int, rotated: bool) -> torch.Tensor:
    """Σ [BATCH, K, K] of a given rank and condition number 10^decades, at a scale of 0.1 to 10."""
    values = torch.logspace(0, -decades, draw.K, dtype=torch.float64)
    values = values * (torch.arange(draw.K) < rank) * 10 ** (2 * draw.uniform(BATCH, 1) - 1)
    basis = torch.eye(draw.K, dtype=torch.float64).expand(BATCH, -1, -1)
    if rotated:
        basis = torch.linalg.qr(draw.normal(BATCH, draw.K, draw.K)).Q
    return basis @ (values[:, :, None] * basis.mT)


cases = st.tuples(st.integers(1, 8), st.floats(0, 8), st.integers(1, 8), st.booleans())


@PROPERTY
@given(seeds, cases)
def test_ratio_curvature_and_newton(seed, case):
    K, decades, rank, rotated = case
    draw = Draw(seed, 1, K)
    sigma = covariance(draw, decades, rank, rotated)
    error, d = draw.normal(BATCH, K, 3), draw.normal(BATCH, K)
    measured, model = ratio(sigma, error, d)
    assert ((measured - model).abs() <= 1e-10 * (1 + measured)).all()
    holds(*curvature_bound(sigma, error))
    # The step's direction is −½∇r as autograd has it; step 1/L² and no normalisation.
    d = d.requires_grad_()
    ratio(sigma, error, d).left.sum().backward()
    step = torch.full((BATCH,), 0.3, dtype=torch.float64)
    _, log_ratio, after = hypergradient_step(
        sigma, error, d.detach(), step, normalised=False, scalar=False
    )
    assert_close(after, d.detach() - 0.15 * d.grad, 1e-8)
    assert_close(log_ratio.exp(), measured, 1e-10)
    if decades < 6:
        # pinv loses the condition number twice over; at 1e8 it measures numpy, not the statement.
        assert (gap(sigma, newton_step(sigma, error)) <= 1e-12 * gap(sigma, error)).all()


@PROPERTY
@given(seeds, st.integers(1, 6), st.floats(0, 2), st.booleans(), st.floats(0.01, 1.99))
def test_full_batch_bound(seed, K, decades, rotated, eta):
    """Any comparator: here one near the best diagonal, exact where Σ is diagonal."""
    draw = Draw(seed, 1, K)
    sigma = covariance(draw, decades, K, rotated)
    u = 1 / sigma.diagonal(dim1=-2, dim2=-1) + rotated * 0.1 * draw.normal(BATCH, K)
    d1 = u + draw.normal(BATCH, K) * 10 ** (2 * draw.uniform(BATCH, 1) - 2)
    holds(*full_batch_bound(sigma, draw.normal(BATCH, K, 2), d1, u, eta=eta, steps=15), 1e-8)


def test_full_batch_bound_is_attained():
    """One step at K = 1 is an equality; over 100 steps the best found is 0.44 a step."""
    sigma, error = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    d1, u = torch.full((1,), 0.6, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    left, right = full_batch_bound(sigma, error, d1, u, eta=1.0, steps=1)
    assert math.isclose(left.item(), right.item(), rel_tol=1e-12)
    left, right = full_batch_bound(sigma, error, d1, u, eta=0.003, steps=100)
    assert 0.44 < math.exp((left - right).item() / 100) <= 1


def test_descent_beats_gradient_descent_only_where_a_diagonal_suffices():
    """κ = 1000: the normalised diagonal needs 17 iterations aligned and thousands rotated."""
    draw = Draw(0, 1, 16)
    values = torch.logspace(0, -3, 16, dtype=torch.float64)
    error, one = draw.normal(16, 4), torch.ones(16, dtype=torch.float64)
    basis = torch.linalg.qr(draw.normal(16, 16)).Q
    plain = gradient_descent_steps(values, error.square().sum(-1), 1e-12)
    aligned = hypergradient_descent(
        torch.diag(values), error, one, eta=1, steps=40, normalised=True
    )
    assert aligned.log_gap[-1] < math.log(1e-12) and plain > 5000
    rotated = hypergradient_descent(
        basis @ (values[:, None] * basis.T), error, one, eta=1, steps=500, normalised=True
    )
    assert rotated.log_gap[-1] > math.log(1e-12)


def test_gradient_descent_steps_counts_what_running_it_gives():
    draw = Draw(4, 1, 5)
    values, error = torch.logspace(0, -1.5, 5, dtype=torch.float64), draw.normal(5, 2)
    best = torch.full((5,), 2 / (values.max() + values.min()).item(), dtype=torch.float64)
    ran = hypergradient_descent(torch.diag(values), error, best, eta=0, steps=400).log_gap
    first = int((ran <= math.log(1e-9)).int().argmax())
    assert gradient_descent_steps(values, error.square().sum(-1), 1e-9) == first


def test_normalised_scalar_descent_is_barzilai_borwein():
    """η = 1: α_{t+1} = ‖G_t‖² / tr(G_tᵀ Σ G_t), the long step of Barzilai and Borwein."""
    draw = Draw(6, 1, 7)
    sigma, error = covariance(draw, 2.0, 7, True)[0], draw.normal(7, 3)
    d, alpha = torch.ones(7, dtype=torch.float64), 1.0
    for _ in range(12):
        gradient = sigma @ error
        long_step = gradient.square().sum() / (gradient * (sigma @ gradient)).sum()
        after = error - alpha * gradient
        error, _, d = hypergradient_step(
            sigma, error, d, torch.ones(()), normalised=True, scalar=True
        )
        alpha = long_step
        assert_close(error / error.norm(), after / after.norm(), 1e-9)
        assert_close(d, alpha.expand(7), 1e-9)


@pytest.mark.parametrize(("K", "rank"), [(10, 4), (12, 4), (6, 3), (30, 7)])
def test_low_rank_memory_has_an_exact_diagonal_comparator(K, rank):
    """r(r+1)/2 ≤ K: generic rotated features, and yet one diagonal step reaches the optimum."""
    draw = Draw(K, 1, K)
    factor, error = draw.normal(K, rank), draw.normal(K, 3)
    sigma = factor @ factor.T
    found = diagonal_comparator(sigma)
    assert found.residual < 1e-8
    assert ratio(sigma, error, found.precond).left < 1e-14
    assert_close(sigma @ (found.precond[:, None] * sigma), sigma, 1e-8)


def test_full_rank_needs_a_diagonal_covariance():
    draw = Draw(1, 1, 6)
    values = torch.logspace(0, -3, 6, dtype=torch.float64)
    assert diagonal_comparator(torch.diag(values)).residual < 1e-12
    assert_close(diagonal_comparator(torch.diag(values)).precond, 1 / values, 1e-9)
    basis = torch.linalg.qr(draw.normal(6, 6)).Q
    sigma = basis @ (values[:, None] * basis.T)
    found = diagonal_comparator(sigma)
    assert found.residual > 0.5
    # The residual is what Statement 10 says it is: a bound on the ratio from any start.
    for _ in range(50):
        assert ratio(sigma, draw.normal(6, 2), found.precond).left <= found.residual**2 + 1e-9
    rank_one = draw.normal(6)
    assert diagonal_comparator(torch.outer(rank_one, rank_one)).residual < 1e-12
