"""Stability statements of docs/explanation/theory.md: how much a product of erases can grow.

The erase of token t is the transition M_t = I − β_t D_t k_t k_tᵀ, D_t = diag d_t. Float64 tensors
with any leading batch shape: k and d [..., T, K], beta [..., T]. Growth is measured as the
spectral norm of the product M_T ··· M_1 and returned as its natural logarithm. A right side is inf
where a statement's conditions do not hold, since nothing is claimed there.
"""

import math

import torch
from torch import Tensor

from theory.bounds import Sides


def transitions(k: Tensor, d: Tensor, beta: Tensor) -> Tensor:
    """M_t = I − β_t D_t k_t k_tᵀ, [..., T, K, K]."""
    eye = torch.eye(k.shape[-1], dtype=k.dtype)
    return eye - (beta[..., None] * d * k)[..., :, None] * k[..., None, :]


def log_growth(k: Tensor, d: Tensor, beta: Tensor) -> Tensor:
    """log ‖M_T ··· M_1‖₂, [...]; rescaled on the way, so that no product overflows."""
    matrices = transitions(k, d, beta)
    product = matrices[..., 0, :, :]
    total = torch.zeros_like(beta[..., 0])
    for t in range(1, k.shape[-2]):
        product = matrices[..., t, :, :] @ product
        size = torch.linalg.matrix_norm(product).clamp_min(1e-300)
        product, total = product / size[..., None, None], total + size.log()
    return total + torch.linalg.matrix_norm(product, ord=2).log()


def _unit(k: Tensor) -> Tensor:
    """Whether every key of a sequence is of length 1, but for rounding; [...]."""
    return ((k.square().sum(-1) - 1).abs() <= 1e-12).all(-1)


def erase_norm(k: Tensor, d: Tensor, beta: Tensor) -> Sides:
    """Statement 14, an identity for d > 0 and K ≥ 2: ‖D^{-1/2} M D^{1/2}‖₂ = max(1, |1 − β⟨d,s⟩|).

    k and d [..., K], beta [...].
    """
    root = d.sqrt()
    inner = transitions(k[..., None, :], d[..., None, :], beta[..., None])[..., 0, :, :]
    similar = inner / root[..., :, None] * root[..., None, :]
    eigenvalue = 1 - beta * (d * k * k).sum(-1)
    return Sides(torch.linalg.matrix_norm(similar, ord=2), eigenvalue.abs().clamp_min(1))


def growth_bound(k: Tensor, d: Tensor, beta: Tensor) -> Sides:
    """Statements 15 and 16: d moving freely in the positive orthant, every β_t⟨d_t, s_t⟩ in [0, 2].

        ‖M_T ··· M_1‖₂ ≤ √(max_i d_{T,i} / min_i d_{1,i}) · Π_t √(max_i d_{t,i} / d_{t+1,i})

    in logarithms. With constant d the product is 1, which leaves √(max d / min d).
    """
    log_d = d.log()
    ends = log_d[..., -1, :].amax(-1) - log_d[..., 0, :].amin(-1)
    steps = (-log_d.diff(dim=-2)).amax(-1).sum(-1)
    overlap = beta * (d * k * k).sum(-1)
    # Rounding may carry an exact reflection, β⟨d, s⟩ = 2, past 2 by an ulp or two.
    claimed = (d > 0).all(-1).all(-1) & ((overlap >= 0) & (overlap <= 2 + 1e-12)).all(-1)
    return Sides(log_growth(k, d, beta), torch.where(claimed, 0.5 * (ends + steps), torch.inf))


def driven_growth_bound(k: Tensor, d: Tensor, beta: Tensor, *, eta: float, floor: float) -> Sides:
    """Statement 17: d driven by the rule itself (b = 1, γ = 1, unit keys, β ≥ 0), above a floor.

        ‖M_T ··· M_1‖₂ ≤ √(max_i d_{T,i} / min_i d_{1,i}) · exp((η / 2a) √(T B))

    with B = ‖d_1 − 1‖² / (η(2 − η)) and the floor a > 0. d is that of
    theory.bounds.precond_path without its last entry, d_1 inside the box if there is one.
    """
    log_d = d.log()
    T = k.shape[-2]
    ends = 0.5 * (log_d[..., -1, :].amax(-1) - log_d[..., 0, :].amin(-1))
    total = (d[..., 0, :] - 1).square().sum(-1) / (eta * (2 - eta))
    right = ends + eta / (2 * floor) * (T * total).sqrt()
    overlap = beta * (d * k * k).sum(-1)
    claimed = (d >= floor).all(-1).all(-1) & (overlap <= 2 + 1e-12).all(-1) & (floor > 0)
    claimed = claimed & (beta >= 0).all(-1) & _unit(k)
    return Sides(log_growth(k, d, beta), torch.where(claimed, right, torch.inf))


def box_growth_bound(k: Tensor, d: Tensor, beta: Tensor) -> Sides:
    """Statement 18: unit keys, β ≤ 1, d anywhere in [0, 2], zero included: ‖M_t‖₂ ≤ √2.

    Hence ‖M_T ··· M_1‖₂ ≤ 2^{T/2}, in logarithms, however d moves.
    """
    claimed = ((d >= 0) & (d <= 2)).all(-1).all(-1) & ((beta >= 0) & (beta <= 1)).all(-1)
    claimed = claimed & _unit(k)
    half = torch.full_like(beta[..., 0], 0.5 * k.shape[-2] * math.log(2))
    return Sides(log_growth(k, d, beta), torch.where(claimed, half, torch.inf))


def zero_row_bound(k: Tensor, d: Tensor, beta: Tensor, x: Tensor) -> Sides:
    """Statement 19: constant d ≥ 0, β ≥ 0; Z = {d_i = 0}, N the rest, w_t = β_t⟨d, s_t⟩ < 2.

        ‖D_N^{-1/2} x_N(T)‖² ≤ ‖D_N^{-1/2} x_N(0)‖² + Σ_t β_t ⟨k_{t,Z}, x_Z⟩² / (2 − w_t)

    and x_Z never changes. d [K], k [..., T, K], beta [..., T], x [..., K] the start of one column.
    """
    live = d > 0
    matrices = transitions(k, d.expand(k.shape), beta)
    end = x
    for t in range(k.shape[-2]):
        end = (matrices[..., t, :, :] @ end[..., None])[..., 0]
    w = beta * (d * k * k).sum(-1)
    forcing = (k[..., ~live] * x[..., None, ~live]).sum(-1).square() * beta / (2 - w)
    start = (x[..., live].square() / d[live]).sum(-1)
    claimed = ((w < 2) & (beta >= 0)).all(-1) & (d >= 0).all()
    right = torch.where(claimed, start + forcing.sum(-1), torch.inf)
    return Sides((end[..., live].square() / d[live]).sum(-1), right)
