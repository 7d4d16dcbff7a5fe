"""Token-local statements of docs/explanation/theory.md: both sides, for given keys, gates and box.

Every function takes float64 tensors with any leading batch shape: k [..., T, K], beta and
log_gamma [..., T], d and u [..., K]. With s_t = k_t ⊙ k_t and z_t = b_t s_t (b_t = β_t if
beta_aware, else 1) the preconditioner's recurrence is

    x_t = 1 − ⟨d_t, z_t⟩        d_{t+1} = clip(γ_t d_t + η x_t z_t, box)

A bound's right side is inf where its conditions on η do not hold, since nothing is claimed there.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from osdn.ops import reference
from osdn.ops.operands import Options

Box = tuple[float, float] | None


class Sides(NamedTuple):
    """The two sides of a statement, left ≤ right (left = right for an identity)."""

    left: Tensor
    right: Tensor


class Path(NamedTuple):
    """What phase 1 does: d [..., T + 1, K], x [..., T] and z [..., T, K]."""

    d: Tensor
    x: Tensor
    z: Tensor


def precond_path(
    k: Tensor,
    d1: Tensor,
    beta: Tensor | None = None,
    log_gamma: Tensor | None = None,
    *,
    eta: float,
    beta_aware: bool = False,
    box: Box = None,
) -> Path:
    """d_1..d_{T+1} from the operator's own step, with x_t and z_t; beta None means 1."""
    beta = torch.ones_like(k[..., 0]) if beta is None else beta
    low, high = (None, None) if box is None else box
    rule = Options(eta, beta_aware, low, high, 1.0)
    d = [d1.expand(k[..., 0, :].shape)]
    for t in range(k.shape[-2]):
        gamma = None if log_gamma is None else log_gamma[..., t]
        d.append(reference.adapt(d[-1], k[..., t, :], beta[..., t], gamma, rule))
    path = torch.stack(d, -2)
    z = k * k * (beta[..., None] if beta_aware else 1.0)
    return Path(path, 1 - (path[..., :-1, :] * z).sum(-1), z)


def write_key_scaling(S: Tensor, d: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Sides:
    """Statement 1: S − β diag(d) ∇f(S), f(S) = ½‖Sᵀk − v‖², is a delta rule with write key d ⊙ k.

    Left is the operator's write; right is the gradient step, spelt out with ∇f(S) = k (Sᵀk − v)ᵀ.
    S [..., K, V], d and k [..., K], v [..., V], beta [...].
    """
    residual = torch.einsum("...kv,...k->...v", S, k) - v
    gradient = torch.einsum("...k,...v->...kv", k, residual)
    step = beta[..., None, None] * torch.diag_embed(d) @ gradient
    return Sides(reference.write(S, d, k, v, beta), S - step)


def contraction_identity(S: Tensor, d: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Sides:
    """Statement 2: f_t(S_t) = (1 − β_t⟨d_t, s_t⟩)² f_t(S_{t−1}). Shapes as in write_key_scaling."""

    def loss(memory: Tensor) -> Tensor:
        return 0.5 * (torch.einsum("...kv,...k->...v", memory, k) - v).square().sum(-1)

    ratio = (1 - beta * (d * k * k).sum(-1)).square()
    return Sides(loss(reference.write(S, d, k, v, beta)), ratio * loss(S))


def decayed_write(
    S: Tensor, d: Tensor, k: Tensor, v: Tensor, beta: Tensor, alpha: Tensor
) -> tuple[Tensor, Sides, Sides]:
    """Statement 20: (S_t, Statement 2 with S̃ = αS in S's place, the bound by S's own residual).

    Shapes as in write_key_scaling; alpha as beta.
    """

    def residual(memory: Tensor) -> Tensor:
        return (torch.einsum("...kv,...k->...v", memory, k) - v).norm(dim=-1)

    kept = alpha[..., None, None] * S
    rate = (1 - beta * (d * k * k).sum(-1)).abs()
    bound = rate * (alpha * residual(S) + (1 - alpha) * v.norm(dim=-1))
    written = reference.write(kept, d, k, v, beta)
    return written, contraction_identity(kept, d, k, v, beta), Sides(residual(written), bound)


def unit_key_bound(k: Tensor, d1: Tensor, *, eta: float, box: Box = None) -> Sides:
    """Statement 4: Σ x_t² ≤ ‖d_1 − 1‖² / (η(2 − η)) for unit keys, b = 1, γ = 1, 0 < η < 2.

    Raises ValueError for keys that are not unit, η outside (0, 2) or a box without the point 1.
    """
    _check_unit(k)
    if not 0 < eta < 2:
        raise ValueError(f"eta: expected a step size in (0, 2), got {eta}")
    _check_inside("the comparator 1", torch.ones_like(d1), box)
    x = precond_path(k, d1, eta=eta, box=box).x
    return Sides(x.square().sum(-1), (d1 - 1).square().sum(-1) / (eta * (2 - eta)))


def unit_key_product(k: Tensor, d1: Tensor, *, eta: float, box: Box = None) -> Sides:
    """Statement 5: Π x_t² ≤ (‖d_1 − 1‖² / (η(2 − η)T))^T, both sides as natural logarithms."""
    T = k.shape[-2]
    right = unit_key_bound(k, d1, eta=eta, box=box).right
    x = precond_path(k, d1, eta=eta, box=box).x
    return Sides(x.square().log().sum(-1), T * (right / T).log())


def distance_identity(k: Tensor, d1: Tensor, *, eta: float) -> Sides:
    """Statement 4's remark: unit keys and no box give η Σ (2 − η‖s_t‖²) x_t² exactly.

    Left is that sum, right is ‖d_1 − 1‖² − ‖d_{T+1} − 1‖²: all that the bound loses is in view.
    """
    _check_unit(k)
    d, x, z = precond_path(k, d1, eta=eta)
    weight = eta * (2 - eta * z.square().sum(-1))
    distance = (d - 1).square().sum(-1)
    return Sides((weight * x.square()).sum(-1), distance[..., 0] - distance[..., -1])


def solve_budget(budget: Tensor, misfit: Tensor, room: Tensor) -> Tensor:
    """The largest X with room·X ≤ budget + 2√(X·misfit): ((√Y + √(Y + cA)) / c)²; inf if c ≤ 0.

    This is Statement 6 at its best λ = room·√Y / (√Y + √(Y + cA)).
    """
    root = misfit.sqrt() + (misfit + room * budget).clamp_min(0).sqrt()
    return torch.where(room > 0, (root / room).square(), torch.inf)


def comparator_bound(
    k: Tensor,
    d1: Tensor,
    u: Tensor,
    beta: Tensor | None = None,
    *,
    eta: float,
    beta_aware: bool = False,
    box: Box = None,
    lam: float | None = None,
) -> Sides:
    """Statement 6: Σ x_t² ≤ (‖d_1 − u‖²/η + Σ y_t²/λ) / (2 − ηR² − λ), y_t = 1 − ⟨u, z_t⟩, γ = 1.

    R² = max ‖z_t‖². lam None takes the best λ; right is inf where 2 − ηR² − λ ≤ 0.
    Raises ValueError for η ≤ 0, λ ≤ 0 or a comparator outside the box.
    """
    if eta <= 0 or (lam is not None and lam <= 0):
        raise ValueError(f"eta, lam: expected positive numbers, got {eta} and {lam}")
    _check_inside("u", u, box)
    path = precond_path(k, d1, beta, eta=eta, beta_aware=beta_aware, box=box)
    misfit = (1 - (u[..., None, :] * path.z).sum(-1)).square().sum(-1)
    budget = (d1 - u).square().sum(-1) / eta
    room = 2 - eta * path.z.square().sum(-1).amax(-1)
    left = path.x.square().sum(-1)
    if lam is None:
        return Sides(left, solve_budget(budget, misfit, room))
    right = torch.where(room > lam, (budget + misfit / lam) / (room - lam), torch.inf)
    return Sides(left, right)


def moving_comparator_bound(
    k: Tensor,
    d1: Tensor,
    u: Tensor,
    beta: Tensor | None = None,
    log_gamma: Tensor | None = None,
    *,
    eta: float,
    beta_aware: bool = False,
    box: tuple[float, float],
) -> Sides:
    """Statement 12: a comparator u [..., T, K] that moves in the box [a, b] with centre c.

        η Σ (2 − ηR²/γ_t − λ) x_t² ≤ ‖d_1 − u_1‖² + ‖u_T − c‖² − ‖u_1 − c‖² + (b − a) P
                                      + Σ (1 − γ_t) ‖u_t‖² + (η/λ) Σ y_t²

    with path length P = Σ ‖u_{t+1} − u_t‖₁ and any γ_t in (0, 1]; at the best λ, and with the
    least γ_t in place of each on the left. Raises ValueError where u leaves the box.
    """
    _check_inside("u", u, box)
    path = precond_path(k, d1, beta, log_gamma, eta=eta, beta_aware=beta_aware, box=box)
    gamma = torch.ones_like(path.x) if log_gamma is None else log_gamma.exp()
    centre = (box[0] + box[1]) / 2
    away = (u - centre).square().sum(-1)
    length = u.diff(dim=-2).abs().sum((-1, -2))
    budget = (d1 - u[..., 0, :]).square().sum(-1) + away[..., -1] - away[..., 0]
    budget = budget + (box[1] - box[0]) * length
    budget = budget + ((1 - gamma) * u.square().sum(-1)).sum(-1)
    misfit = (1 - (u * path.z).sum(-1)).square().sum(-1)
    room = 2 - eta * path.z.square().sum(-1).amax(-1) / gamma.amin(-1)
    return Sides(path.x.square().sum(-1), solve_budget(budget / eta, misfit, room))


def forgetting_bound(
    k: Tensor,
    d1: Tensor,
    u: Tensor,
    beta: Tensor | None = None,
    *,
    gamma: float,
    eta: float,
    beta_aware: bool = False,
    box: Box = None,
) -> Sides:
    """Statement 13: constant γ < 1 pays for a moving comparator with no box at all.

        (η/γ) Σ (2 − ηR²/γ − λ) x_t² ≤ ‖d_1 − u_1‖² + Σ ‖u_{t+1} − u_t‖² / (1 − γ)
                                          + ((1 − γ)/γ) Σ ‖u_t‖² + (η/(γλ)) Σ y_t²

    at the best λ; u [..., T, K]. Raises ValueError for γ outside (0, 1) or u outside a given box.
    """
    if not 0 < gamma < 1:
        raise ValueError(f"gamma: expected a retention in (0, 1), got {gamma}")
    _check_inside("u", u, box)
    log_gamma = torch.full_like(k[..., 0], gamma).log()
    path = precond_path(k, d1, beta, log_gamma, eta=eta, beta_aware=beta_aware, box=box)
    moved = u.diff(dim=-2).square().sum((-1, -2)) / (1 - gamma)
    pull = (1 - gamma) / gamma * u.square().sum((-1, -2))
    budget = (d1 - u[..., 0, :]).square().sum(-1) + moved + pull
    misfit = (1 - (u * path.z).sum(-1)).square().sum(-1)
    room = 2 - eta / gamma * path.z.square().sum(-1).amax(-1)
    return Sides(path.x.square().sum(-1), solve_budget(gamma / eta * budget, misfit, room))


def _check_unit(k: Tensor) -> None:
    error = (k.square().sum(-1) - 1).abs().max().item()
    if not error < 1e-9:
        raise ValueError(f"k: expected unit keys, got a squared norm {error:.1e} away from 1")


def _check_inside(name: str, u: Tensor, box: Box) -> None:
    if box is not None and not bool(((u >= box[0]) & (u <= box[1])).all()):
        raise ValueError(f"{name}: expected to lie in the box {box}, got values outside it")
