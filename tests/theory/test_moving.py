"""Statements 11 to 13: APF as regularised descent, and comparators that move."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from osdn.ops import reference
from osdn.ops.operands import Options
from tests.numerics import assert_close
from tests.theory.instances import BATCH, PROPERTY, Draw, families, holds, seeds, shapes
from theory.bounds import forgetting_bound, moving_comparator_bound, precond_path


@PROPERTY
@given(seeds, shapes, families, st.floats(0.01, 2.0), st.booleans())
def test_forgetting_is_descent_on_a_regularised_loss(seed, shape, family, eta, beta_aware):
    """Statement 11, with autograd's gradient of ½x² + (1 − γ)/(2η) ‖d‖²."""
    draw = Draw(seed, *shape)
    k, beta, gamma = draw.keys(family)[:, 0], 2 * draw.uniform(BATCH), 0.5 + draw.uniform(BATCH) / 2
    d = draw.normal(BATCH, draw.K).requires_grad_()
    b = beta if beta_aware else 1.0
    x = 1 - b * (d * k * k).sum(-1)
    (0.5 * x.square() + (1 - gamma) / (2 * eta) * d.square().sum(-1)).sum().backward()
    rule = Options(eta, beta_aware, None, None, 1.0)
    assert_close(d - eta * d.grad, reference.adapt(d, k, beta, gamma.log(), rule), 1e-13)


def path_of_comparators(draw: Draw, box: tuple[float, float], pace: float) -> torch.Tensor:
    """u [BATCH, T, K] in the box, of rare jumps and small drifts."""
    jumps = draw.inside(box, BATCH, draw.T, draw.K)
    stay = draw.uniform(BATCH, draw.T, 1) > pace
    u = [jumps[:, 0]]
    for t in range(1, draw.T):
        u.append(torch.where(stay[:, t], u[-1] + 0.01 * draw.normal(BATCH, draw.K), jumps[:, t]))
    return torch.stack(u, 1).clamp(*box)


@PROPERTY
@given(seeds, shapes, families, st.floats(0.01, 1.8), st.booleans(), st.floats(0, 1))
def test_moving_comparator_bounds(seed, shape, family, eta, beta_aware, pace):
    draw = Draw(seed, *shape)
    k = draw.keys(family) * 1.1 * draw.uniform(BATCH, draw.T, 1) ** 0.3
    beta = 0.3 + 0.7 * draw.uniform(BATCH, draw.T)
    for box in ((0.0, 2.0), (2 / 3, 1.5)):
        d1, u = 2 * draw.normal(BATCH, draw.K), path_of_comparators(draw, box, pace)
        options = {"eta": eta, "beta_aware": beta_aware}
        log_gamma = 0.1 * draw.uniform(BATCH, draw.T).log()
        for gates in (None, log_gamma):
            holds(*moving_comparator_bound(k, d1, u, beta, gates, box=box, **options))
        for gamma in (0.7, 0.99, 1 - 1e-6):
            for active in (None, box):
                holds(*forgetting_bound(k, d1, u, beta, gamma=gamma, box=active, **options))


def test_moving_comparator_bound_is_attained():
    """u drifts across the box on a coordinate no key touches; then one key pays for all of it."""
    T = 50
    k, u = torch.zeros(T, 2, dtype=torch.float64), torch.ones(T, 2, dtype=torch.float64)
    k[:-1, 1], k[-1, 0] = 1, 1
    u[:, 0] = torch.linspace(0, 1, T, dtype=torch.float64)
    d1 = torch.tensor([0.0, 1.0], dtype=torch.float64)
    x = precond_path(k, d1, eta=1.0, box=(0.0, 1.0)).x
    assert x[:-1].abs().max() == 0 and x[-1] == 1
    left, right = moving_comparator_bound(k, d1, u, eta=1.0, box=(0.0, 1.0))
    assert math.isclose((left / right).item(), 1.0, rel_tol=1e-9)


def test_forgetting_bound_is_not_vacuous():
    """One token, γ → 1: equality. A comparator that jumps once: 0.22, the best found."""
    k = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    d1, u = torch.tensor([0.0, 1.0], dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)
    gamma = 1 - 1e-6
    left, right = forgetting_bound(k[1:], d1, u[:1], gamma=gamma, eta=gamma)
    assert 0.999 < (left / right).item() <= 1 + 1e-9
    u[0, 0] = 0
    left, right = forgetting_bound(k, d1, u, gamma=0.63, eta=0.63)
    assert 0.22 < (left / right).item() <= 1
