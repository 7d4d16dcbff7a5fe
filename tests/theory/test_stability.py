"""Statements 14 to 19: what a product of erases can and cannot do."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.numerics import assert_close
from tests.theory.instances import BATCH, PROPERTY, Draw, families, holds, seeds, shapes
from theory.bounds import precond_path
from theory.stability import (
    box_growth_bound,
    driven_growth_bound,
    erase_norm,
    growth_bound,
    log_growth,
    transitions,
    zero_row_bound,
)


@PROPERTY
@given(seeds, st.integers(2, 8), families)
def test_erase_norm(seed, K, family):
    draw = Draw(seed, 1, K)
    d = 10 ** (4 * draw.uniform(BATCH, K) - 3)
    beta = 2 * draw.uniform(BATCH)
    left, right = erase_norm(draw.keys(family)[:, 0], d, beta)
    # Similarity by D^{1/2} carries the condition number of D^{1/2}, 100, into rounding.
    assert_close(left, right, 1e-12)


@PROPERTY
@given(seeds, shapes, families, st.booleans(), st.sampled_from((1e-8, 1e-2, 0.5)))
def test_growth_bound(seed, shape, family, constant, low):
    draw = Draw(seed, *shape)
    k, beta = draw.keys(family), draw.uniform(BATCH, draw.T)
    d = low * (2 / low) ** draw.uniform(BATCH, 1 if constant else draw.T, draw.K)
    d = d.expand(BATCH, draw.T, draw.K)
    left, right = growth_bound(k, d, beta)
    assert (right < math.inf).all()
    holds(left, right, 1e-9)
    if constant:
        assert_close(right, 0.5 * (d[:, 0].amax(-1) / d[:, 0].amin(-1)).log(), 1e-12)
    holds(*box_growth_bound(k, d, beta), 1e-9)


def reflection(i: int, j: int, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(unit k, β) whose erase is D^{1/2} (swap of e_i and e_j) D^{-1/2}: β⟨d, s⟩ = 2."""
    k = torch.zeros_like(d)
    k[i], k[j] = d[i] ** -0.5, -(d[j] ** -0.5)
    k = k / k.norm()
    return k, 2 / (d * k * k).sum()


def test_growth_bounds_are_attained():
    """d swaps two coordinates at each token and a reflection moves the memory along: equality."""
    swapped = torch.tensor([[0.5, 3.0], [3.0, 0.5]], dtype=torch.float64)
    d = swapped.repeat(6, 1)
    k, beta = map(torch.stack, zip(*(reflection(0, 1, row) for row in d)))
    left, right = growth_bound(k, d, beta)
    assert math.isclose(left.item(), right.item(), rel_tol=1e-9)
    assert math.isclose(right.item(), 6 * math.log(6), rel_tol=1e-9)
    left, right = growth_bound(k[:1], d[:1], beta[:1])
    assert math.isclose(left.item(), right.item(), rel_tol=1e-9)


def test_growth_bound_is_attained_inside_the_box():
    """Unit keys, β ≤ 1 and constant d in [0.2, 2]: a slow rotation reaches √(b/a) within 1%."""
    d = torch.tensor([0.2, 2.0], dtype=torch.float64)
    angle = torch.linspace(0, math.pi / 2, 400, dtype=torch.float64).repeat_interleave(20)
    # u = D^{1/2}k is orthogonal to the vector being carried from e_1 to e_2.
    u = torch.stack([-angle.sin(), angle.cos()], -1)
    k = torch.nn.functional.normalize(u / d.sqrt(), dim=-1)
    d = d.expand(k.shape)
    beta = (1 / (d * k * k).sum(-1)).clamp_max(1)
    left, right = growth_bound(k, d, beta)
    assert 0.99 < math.exp((left - right).item()) <= 1


def test_one_erase_in_the_box_attains_sqrt_two():
    k = torch.full((1, 2), 0.5**0.5, dtype=torch.float64)
    d, beta = torch.tensor([[2.0, 0.0]], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    left, right = box_growth_bound(k, d, beta)
    assert math.isclose(left.item(), right.item(), rel_tol=1e-12)


def test_the_box_alone_does_not_stop_exponential_growth():
    """operator.md: the box [0, 2] makes each erase a contraction, in a norm that moves with d.

    d alternates between (2, 0) and (0, 2), unit keys, β = 1: 1.26 a token.
    """
    angle = torch.tensor([math.pi / 3, math.pi / 6], dtype=torch.float64).repeat(100)
    k = torch.stack([angle.cos(), angle.sin()], -1)
    d = torch.tensor([[2.0, 0.0], [0.0, 2.0]], dtype=torch.float64).repeat(100, 1)
    growth = log_growth(k, d, torch.ones(200, dtype=torch.float64)).item() / 200
    pair = torch.linalg.eigvals(transitions(k[1:2], d[1:2], torch.ones(1))[0]
                                @ transitions(k[:1], d[:1], torch.ones(1))[0])  # fmt: skip
    assert math.isclose(math.exp(growth), pair.abs().max().sqrt().item(), rel_tol=0.01)
    assert math.exp(growth) > 1.2


@pytest.mark.parametrize(
    ("gamma", "box", "keys", "rate"),
    [
        (0.05, (0.0, 2.0), [[0.27609, 0.96113], [0.96153, 0.27472]], 1.04),
        (
            0.5, (0.0, 2.0),
            [[-2.4867, -1.1409, -0.3324], [1.4342, -0.1889, 2.7699], [-0.1961, -2.1274, 0.9813]],
            1.015,
        ),
        (
            0.9, (2 / 3, 1.5),
            [[0.4339, 0.1566, 0.654], [0.1709, -0.5628, -0.3287], [2.276, -1.7094, 0.7223]],
            1.0005,
        ),
    ],
)  # fmt: skip
def test_forgetting_can_make_the_memory_grow_for_ever(gamma, box, keys, rate):
    """Periodic unit keys, β = 1, η = 1, d_1 = 1, d by the rule itself: found by random search.

    With γ = 1 the same keys leave d at 1: plain erases, which never expand.
    """
    T = 3000
    cycle = torch.nn.functional.normalize(torch.tensor(keys, dtype=torch.float64), dim=-1)
    k = cycle.repeat(T // len(keys), 1)
    one, beta = torch.ones(k.shape[-1], dtype=torch.float64), torch.ones(T, dtype=torch.float64)
    log_gamma = torch.full((T,), math.log(gamma), dtype=torch.float64)
    grown = precond_path(k, one, None, log_gamma, eta=1.0, box=box).d[:-1]
    kept = precond_path(k, one, eta=1.0, box=box).d[:-1]
    assert math.exp(log_growth(k, grown, beta).item() / T) > rate
    assert log_growth(k, kept, beta) <= 1e-9


@PROPERTY
@given(seeds, shapes, families, st.floats(0.05, 1.9), st.booleans())
def test_driven_growth_bound(seed, shape, family, eta, boxed):
    draw = Draw(seed, *shape)
    k, beta = draw.keys(family), draw.uniform(BATCH, draw.T)
    if boxed:
        floor, box = 0.2, (0.2, 2.0)
        d1 = draw.inside(box, BATCH, draw.K)
    else:
        # Statement 17's other half: a start within 1 of the point 1 never leaves [0, 2].
        floor, box = 0.2, None
        d1 = 1 + 0.8 * torch.nn.functional.normalize(draw.normal(BATCH, draw.K), dim=-1)
    path = precond_path(k, d1, eta=eta, box=box)
    left, right = driven_growth_bound(k, path.d[:, :-1], beta, eta=eta, floor=floor - 1e-12)
    assert (right < math.inf).all()
    holds(left, right, 1e-9)


@PROPERTY
@given(seeds, shapes, families, st.floats(0.01, 1.99), st.floats(0, 1))
def test_a_ball_around_one_needs_no_box(seed, shape, family, eta, radius):
    """operator.md says "without a box nothing does": a start within 1 of the point 1 does."""
    draw = Draw(seed, *shape)
    k = draw.keys(family)
    d1 = 1 + radius * torch.nn.functional.normalize(draw.normal(BATCH, draw.K), dim=-1)
    d = precond_path(k, d1, eta=eta).d
    assert (d - 1).norm(dim=-1).max() <= radius + 1e-12
    overlap = (d[:, :-1] * k * k).sum(-1)
    assert overlap.min() >= -1e-12 and overlap.max() <= 2 + 1e-12


@PROPERTY
@given(seeds, st.integers(1, 40), families, st.floats(0.05, 1.0))
def test_zero_row_bound(seed, T, family, most):
    draw = Draw(seed, T, 6)
    d = torch.tensor([0.0, 1.0, 1.99, 0.0, 0.01, 0.5], dtype=torch.float64)
    k, beta = draw.keys(family), most * draw.uniform(BATCH, T)
    holds(*zero_row_bound(k, d, beta, draw.normal(BATCH, 6)))


@pytest.mark.parametrize("T", [100, 10_000])
def test_zero_rows_make_the_memory_grow_like_sqrt_t(T):
    """d = (1, 0), k = (ε, 1)/norm with ε = T^-1/2: a row that is never written drives the other."""
    k = torch.nn.functional.normalize(torch.tensor([[T**-0.5, 1.0]], dtype=torch.float64), dim=-1)
    d = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    matrix = transitions(k, d, torch.ones(1, dtype=torch.float64))[0]
    grown = torch.linalg.matrix_norm(torch.linalg.matrix_power(matrix, T), ord=2).item()
    assert 0.5 < grown / T**0.5 < 1


BOUNDS = {
    "box": box_growth_bound,
    "driven": lambda k, d, beta: driven_growth_bound(k, d, beta, eta=1.0, floor=0.2),
    "zero row": lambda k, d, beta: zero_row_bound(k, d[0], beta, torch.ones(2, dtype=d.dtype)),
}


@pytest.mark.parametrize(
    ("bound", "length", "d", "beta"),
    [
        ("box", 3.0, 1.0, 1.0),
        ("driven", 1.4, 1.0, 1.0),
        ("driven", 1.0, 1.0, -1.0),
        ("zero row", 1.0, -0.5, 1.0),
        ("zero row", 1.0, 1.0, -1.0),
    ],
)
def test_nothing_is_claimed_outside_a_bounds_conditions(bound, length, d, beta):
    def right(length, d, beta):
        like = {"dtype": torch.float64}
        k = length * torch.tensor([[1.0, 0.0], [0.6, 0.8]], **like)
        d = torch.tensor([d, 1.0], **like).expand(2, 2)
        return BOUNDS[bound](k, d, torch.full((2,), beta, **like)).right

    assert right(1.0, 1.0, 1.0) < math.inf
    assert right(length, d, beta) == math.inf
