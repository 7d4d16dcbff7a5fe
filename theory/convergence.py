"""Full-batch statements of docs/explanation/theory.md: gradient descent with a learned diagonal.

f(S) = ½ E‖Sᵀk − v‖² with Σ = E[kkᵀ] and optimum S*; everything is said of the error E = S − S*:

    φ = ½ tr(Eᵀ Σ E) = f(S) − f(S*)      G = Σ E = ∇f(S)      E⁺ = E − diag(d) G
    r(d) = φ⁺ / φ = 1 − (⟨d, ρ⟩ − ½ dᵀ M d) / φ      ρ_i = ‖G_i‖²      M = Σ ⊙ (G Gᵀ)

Float64 tensors with any leading batch shape: sigma [..., K, K] symmetric positive semi-definite,
error [..., K, V], d [..., K].
"""

from typing import NamedTuple

import torch
from torch import Tensor

from theory.bounds import Sides, solve_budget


class Descent(NamedTuple):
    """log_gap [steps + 1, ...] is log(φ_t / φ_1); precond [..., K] is the last d."""

    log_gap: Tensor
    precond: Tensor


class Diagonal(NamedTuple):
    """d [K], and residual ‖I − AᵀDA‖₂ for Σ = AAᵀ: a step with d leaves φ⁺ ≤ residual² φ."""

    precond: Tensor
    residual: float


def gap(sigma: Tensor, error: Tensor) -> Tensor:
    """φ = ½ tr(Eᵀ Σ E), [...]."""
    return 0.5 * (error * (sigma @ error)).sum((-1, -2))


def newton_step(sigma: Tensor, error: Tensor) -> Tensor:
    """Statement 7: the error after one step with the preconditioner Σ†; its gap is 0."""
    return error - torch.linalg.pinv(sigma, hermitian=True) @ (sigma @ error)


def ratio(sigma: Tensor, error: Tensor, d: Tensor) -> Sides:
    """Statement 8: r(d) = φ(E − DG)/φ(E), left as measured, right as its quadratic in d."""
    gradient = sigma @ error
    phi = gap(sigma, error)
    slope, curvature = _quadratic(sigma, gradient)
    model = (d * slope).sum(-1) - 0.5 * torch.einsum("...i,...ij,...j->...", d, curvature, d)
    return Sides(gap(sigma, error - d[..., None] * gradient) / phi, 1 - model / phi)


def curvature_bound(sigma: Tensor, error: Tensor) -> Sides:
    """Statement 8: ‖J‖² = λ_max(M)/(2φ) ≤ L², L = λ_max(Σ); J is the Jacobian of Statement 3."""
    _, curvature = _quadratic(sigma, sigma @ error)
    norm = torch.linalg.eigvalsh(curvature)[..., -1] / (2 * gap(sigma, error))
    return Sides(norm, torch.linalg.eigvalsh(sigma)[..., -1].square())


def hypergradient_step(
    sigma: Tensor, error: Tensor, d: Tensor, step: Tensor, *, normalised: bool, scalar: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One iteration: (E⁺, log r(d), d⁺) with d⁺ = d − (step/2) ∇r(d).

    normalised divides step by an upper bound on ‖J‖², the largest row sum of |M| over 2φ (for
    scalar, which keeps d a multiple of 1, by 1ᵀM1/2φ itself: with step 1 that is the
    Barzilai-Borwein method). E⁺ is rescaled to φ = 1, which changes no later ratio.
    """
    gradient = sigma @ error
    phi = gap(sigma, error)[..., None]
    slope, curvature = _quadratic(sigma, gradient)
    downhill = (slope - (curvature @ d[..., None])[..., 0]) / (2 * phi)
    if scalar:
        downhill = downhill.sum(-1, keepdim=True).expand_as(d)
    if normalised:
        norm = curvature.sum((-1, -2)) if scalar else curvature.abs().sum(-1).amax(-1)
        step = step * 2 * phi[..., 0] / norm
    moved = error - d[..., None] * gradient
    left = gap(sigma, moved)
    scale = torch.where(left > 0, left, 1.0).rsqrt()
    return (
        moved * scale[..., None, None],
        (left / phi[..., 0]).log(),
        d + step[..., None] * downhill,
    )


def hypergradient_descent(
    sigma: Tensor,
    error: Tensor,
    d: Tensor,
    *,
    eta: float,
    steps: int,
    normalised: bool = False,
    scalar: bool = False,
) -> Descent:
    """Gradient descent on S with diag(d), and hypergradient descent with step η/L² on ½r(d).

    scalar learns one number: the step on it is then that of its own least-squares problem.
    A run that reaches φ = 0 stays there (log_gap −inf).
    """
    smoothness = torch.linalg.eigvalsh(sigma)[..., -1]
    step = torch.full_like(smoothness, eta) / (1.0 if normalised else smoothness.square())
    total = torch.zeros_like(smoothness)
    log_gap = [total]
    for _ in range(steps):
        error, log_ratio, d_next = hypergradient_step(
            sigma, error, d, step, normalised=normalised, scalar=scalar
        )
        total = torch.where(total == -torch.inf, total, total + log_ratio)
        d = torch.where((total > -torch.inf)[..., None], d_next, d)
        log_gap.append(total)
    return Descent(torch.stack(log_gap), d)


def full_batch_bound(
    sigma: Tensor, error: Tensor, d1: Tensor, u: Tensor, *, eta: float, steps: int
) -> Sides:
    """Statement 9: log(φ_{T+1}/φ_1) ≤ T log(X/T), with X the bound of Statement 3 on Σ r_t(d_t).

    X = ((√Y + √(Y + cA))/c)², A = L²‖d_1 − u‖²/η, c = 2 − η, Y = Σ r_t(u): with an interpolating
    comparator (Y = 0) the right side is T log(L²‖d_1 − u‖² / (η(2 − η)T)). A run that reaches
    φ = 0 stays there and adds nothing to Y: left is −inf.
    """
    smoothness = torch.linalg.eigvalsh(sigma)[..., -1]
    step = torch.full_like(smoothness, eta) / smoothness.square()
    misfit, total, d = torch.zeros_like(smoothness), torch.zeros_like(smoothness), d1
    for _ in range(steps):
        alive = total > -torch.inf
        misfit = misfit + torch.where(alive, ratio(sigma, error, u).left, 0.0)
        error, log_ratio, d = hypergradient_step(
            sigma, error, d, step, normalised=False, scalar=False
        )
        total = torch.where(alive, total + log_ratio, total)
    budget = smoothness.square() * (d1 - u).square().sum(-1) / eta
    bound = solve_budget(budget, misfit, torch.full_like(smoothness, 2 - eta))
    return Sides(total, steps * (bound / steps).log())


def diagonal_comparator(sigma: Tensor) -> Diagonal:
    """Statement 10: the diagonal nearest to solving AᵀDA = I, Σ = AAᵀ with A [K, rank].

    Residual 0 means that one step with D reaches the optimum from everywhere (ΣDΣ = Σ). It is
    least squares over r(r+1)/2 equations in K unknowns; entries may be negative. sigma [K, K].
    """
    values, vectors = torch.linalg.eigh(sigma)
    kept = values > values[-1] * sigma.shape[-1] * torch.finfo(sigma.dtype).eps
    factor = vectors[:, kept] * values[kept].sqrt()
    rank = factor.shape[1]
    design = torch.einsum("ki,kj->ijk", factor, factor).reshape(rank * rank, -1)
    target = torch.eye(rank, dtype=sigma.dtype)
    # gelsd: the equations are symmetric, so the design is rank deficient by construction.
    solution = torch.linalg.lstsq(design, target.reshape(-1, 1), driver="gelsd").solution[:, 0]
    left = target - factor.T @ (solution[:, None] * factor)
    return Diagonal(solution, torch.linalg.matrix_norm(left, ord=2).item())


def gradient_descent_steps(eigenvalues: Tensor, start: Tensor, tolerance: float) -> int:
    """Iterations of gradient descent with the best fixed step 2/(L + μ) until φ_t ≤ tolerance φ_1.

    Counted without running it: in the eigenbasis φ after n steps is ½ Σ λ_i (1 − αλ_i)^{2n} E_i².
    eigenvalues [K] positive, start [K]: the squared error along each eigenvector.
    """
    shrink = 1 - 2 * eigenvalues / (eigenvalues.max() + eigenvalues.min())
    weight = eigenvalues * start

    def reached(n: int) -> bool:
        return bool((weight * shrink.abs() ** (2 * n)).sum() <= tolerance * weight.sum())

    high = 1
    while not reached(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def _quadratic(sigma: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """ρ [..., K] and M [..., K, K] of the module's equation."""
    return gradient.square().sum(-1), sigma * (gradient @ gradient.mT)
