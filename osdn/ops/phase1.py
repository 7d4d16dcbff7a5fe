"""Phase 1 of the chunkwise backend: the path of the preconditioner and its gradient.

With z_t = b_t s_t the recurrence of one row is x_t = 1 − ⟨d_t, z_t⟩, d_{t+1} = γ_t d_t + η x_t z_t,
projected onto the box. Within a chunk of C tokens let F[j, t] = Π_{j<i≤t} γ_i (0 for t < j): the
weight of token j's update in d_{t+1}. Without the box, U[j, t] = η ⟨z_j, z_t⟩ F[j, t−1] for j < t
and the row vector x obey

    x (I + U)  = 1 − Γ ⊙ (d_1 zᵀ)                             Γ_t = Π_{i<t} γ_i
    d_{t+1}    = Σ_j F[j, t] (η x_j z_j + [j=1] γ_1 d_1)

so only two row-by-matrix products a chunk are sequential. A path that stays in the box is exact (by
induction over t); a row that leaves it is run again token by token from the start of the chunk.

Gradient, with λ_t = dL/dd_t along the whole recurrence, dd_t the direct gradient and λ′ the one
that enters at the chunk's end (i = C + 1), a_t = ⟨λ_{t+1}, z_t⟩:

    a (I + U)ᵀ = ⟨Σ_{i>t} F[t, i−1] g_i, z_t⟩                 g_i = dd_i, and λ′ for i = C + 1
    λ_{t+1}    = Σ_{i>t} F[t, i−1] (g_i − [i≤C] η a_i z_i)

Rows are [R, C, ·] as in osdn.ops.varlen. Source of the recurrence: arXiv 2605.13473; the chunked
form is derived in docs/operator.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from osdn.ops.rule import Rule

Spans = list[tuple[int, int]]


class Prepared(NamedTuple):
    """What the sequential part needs, for all chunks of a group at once.

    z: [R, C, K].  gamma: [R, C] or None for γ = 1.  decay: F, [R, C, C].  inverse: (I + U)⁻¹.
    before: Γ, [R, C, 1] or None.
    """

    z: Tensor
    gamma: Tensor | None
    decay: Tensor
    inverse: Tensor
    before: Tensor | None


def unit_upper_inverse(U: Tensor) -> Tensor:
    """(I + U)⁻¹ for strictly upper triangular U, [R, C, C]."""
    eye = torch.eye(U.shape[-1], dtype=U.dtype, device=U.device).expand_as(U)
    return torch.linalg.solve_triangular(U, eye, upper=True, unitriangular=True)


def prepare(z: Tensor, log_gamma: Tensor | None, eta: float) -> Prepared:
    """The parallel part over z [R, C, K] and log_gamma [R, C]."""
    R, C, _ = z.shape
    U = torch.bmm(z, z.mT)
    if log_gamma is None:
        decay = z.new_ones(C, C).triu_().expand(R, C, C)
        return Prepared(z, None, decay, unit_upper_inverse(U.triu_(1).mul_(eta)), None)
    # Sums of log γ over stretches, never differences of sums: those lose digits after a large one.
    after = torch.ones(C, C, dtype=torch.bool, device=z.device).triu_(1)
    decay = torch.where(after, log_gamma[:, None, :], 0).cumsum_(-1).exp_().triu_()
    U[:, :, 1:].mul_(decay[:, :, :-1])
    U[:, :, 0] = 0
    gamma = log_gamma.exp()
    before = torch.ones_like(gamma)
    torch.mul(decay[:, 0, :-1], gamma[:, :1], out=before[:, 1:])
    return Prepared(z, gamma, decay, unit_upper_inverse(U.mul_(eta)), before[:, :, None])


def forward(p: Prepared, spans: Spans, d: Tensor, rule: Rule) -> Tensor:
    """The path d_1..d_C of every chunk, [R, C, K]; d [N·H, K] goes to the end of the group."""
    before = p.z if p.before is None else p.z * p.before
    sources = torch.bmm(before.mT, p.inverse)
    constant = p.inverse.sum(-2, keepdim=True)
    boxed = rule.precond_min is not None
    start = d.clone() if boxed else d
    path, after = _affine(p, sources, constant, spans, start, rule)
    if boxed and not _inside(after, rule).all():
        start.copy_(d)
        for span in spans:
            _repaired(p, sources, constant, span, start, rule, path)
    if boxed:
        d.copy_(start)
    return path


def _affine(
    p: Prepared, sources: Tensor, constant: Tensor, spans: Spans, d: Tensor, rule: Rule
) -> tuple[Tensor, Tensor]:
    """(d_1..d_C, d_2..d_{C+1}) as if there were no box, for the rows of spans; d moves on."""
    a, b = spans[0][0], spans[-1][1]
    z, decay = p.z[a:b], p.decay[a:b]
    gain = z * rule.eta if p.gamma is None else z * (decay[:, :, -1:] * rule.eta)
    starts = torch.empty_like(z[:, :1])
    x = torch.empty_like(constant[a:b])
    whole = _whole(p)
    for i, j in spans:
        now = d[: j - i].unsqueeze(1)
        at = slice(i - a, j - a)
        starts[at] = now
        torch.baddbmm(constant[i:j], now, sources[i:j], alpha=-1, out=x[at])
        if whole is not None:
            now.mul_(whole[i:j])
        now.baddbmm_(x[at], gain[at])
    writes = (z * x.mT).mul_(rule.eta)
    writes[:, :1] += starts if p.gamma is None else starts * p.gamma[a:b, :1, None]
    after = torch.bmm(decay.mT, writes)
    return torch.cat((starts, after[:, :-1]), 1), after


def _whole(p: Prepared) -> Tensor | None:
    """What is left of d after a whole chunk: Π_t γ_t, [R, 1, 1]."""
    return None if p.gamma is None else (p.decay[:, 0, -1:] * p.gamma[:, :1]).unsqueeze(-1)


def _repaired(
    p: Prepared, sources: Tensor, constant: Tensor, span: tuple[int, int], d: Tensor, rule: Rule,
    path: Tensor,
) -> None:  # fmt: skip
    """One step with the box: writes its rows of path and moves d on."""
    i, j = span
    start = d[: j - i].clone()
    path[i:j], after = _affine(p, sources, constant, [span], d, rule)
    bad = _inside(after, rule).flatten(1).all(1).logical_not_().nonzero()[:, 0]
    if len(bad):
        gamma = None if p.gamma is None else p.gamma[i:j][bad]
        path[i:j].index_copy_(0, bad, _scan(p.z[i:j][bad], gamma, start[bad], rule, d, bad))


def _scan(
    z: Tensor, gamma: Tensor | None, start: Tensor, rule: Rule, d: Tensor, rows: Tensor
) -> Tensor:
    """The recurrence token by token over one chunk: d_1..d_C [R, C, K]; its end goes to d[rows]."""
    z = z.transpose(0, 1).contiguous()
    steps = (z * rule.eta).unbind(0)
    path = z.new_empty(z.shape[0] + 1, *z.shape[1:])
    path[0] = start
    gammas = None if gamma is None else gamma.t().unsqueeze(-1).unbind(0)
    states, u = path.unbind(0), torch.empty_like(start)
    for t, z_t in enumerate(z.unbind(0)):
        now = states[t]
        dot = torch.linalg.vecdot(now, z_t).unsqueeze(-1)
        if gammas is None:
            torch.add(now, steps[t], out=u)
        else:
            torch.addcmul(steps[t], now, gammas[t], out=u)
        u.addcmul_(dot, z_t, value=-rule.eta)
        torch.clamp(u, rule.precond_min, rule.precond_max, out=states[t + 1])
    d.index_copy_(0, rows, path[-1])
    return path[:-1].transpose(0, 1)


def _inside(u: Tensor, rule: Rule) -> Tensor:
    assert rule.precond_min is not None and rule.precond_max is not None
    return (u >= rule.precond_min).logical_and_(u <= rule.precond_max)


def backward(
    p: Prepared, path: Tensor, dd: Tensor, spans: Spans, lam: Tensor, rule: Rule
) -> tuple[Tensor, Tensor | None]:
    """(dz [R, C, K], dlog_gamma [R, C] or None) of a group of chunks, from its end to its start.

    path: d_1..d_C, [R, C, K].  dd: gradient of each d_t from its own write, [R, C, K].
    lam: [N·H, K] dL/dd at the end of the group; becomes that at its start.
    """
    z, eta = p.z, rule.eta
    x = torch.linalg.vecdot(path, z).neg_().add_(1).unsqueeze(-1)
    passed = _passed(p, path, x, rule)
    later = torch.cat((dd[:, 1:], torch.zeros_like(dd[:, :1])), 1)
    a = torch.linalg.vecdot(torch.bmm(p.decay, later), z).unsqueeze(1)
    a = torch.bmm(a, p.inverse.mT)
    entering = torch.bmm((z if p.gamma is None else z * p.decay[:, :, -1:]).mT, p.inverse.mT)
    leaving = z * eta if p.before is None else z * (p.before * eta)
    direct = dd.sum(1, keepdim=True) if p.before is None else torch.bmm(p.before.mT, dd)
    whole = _whole(p)
    repairs = []
    for i, j in reversed(spans):
        now = lam[: j - i].unsqueeze(1)
        later[i:j, -1:] = now
        a[i:j].baddbmm_(now, entering[i:j])
        rows = None if passed is None else _left_box(passed[i:j])
        if rows is not None:
            arriving = lam[rows]
        if whole is not None:
            now.mul_(whole[i:j])
        now.add_(direct[i:j]).baddbmm_(a[i:j], leaving[i:j], alpha=-1)
        if rows is not None and passed is not None:
            gamma = None if p.gamma is None else p.gamma[i:j][rows]
            chunk = (dd[i:j][rows], z[i:j][rows], gamma, passed[i:j][rows])
            repaired, start = _scan_back(*chunk, arriving, eta)
            lam.index_copy_(0, rows, start)
            repairs.append((rows + i, repaired))
    later[:, :-1].addcmul_(z[:, 1:], a.mT[:, 1:], value=-eta)
    after = torch.bmm(p.decay, later)
    for rows, repaired in repairs:
        after.index_copy_(0, rows, repaired)
    return _token_gradients(p, path, x, after, eta)


def _passed(p: Prepared, path: Tensor, x: Tensor, rule: Rule) -> Tensor | None:
    """1 where clip passed u = γ d + η x z unchanged, else 0, in z's dtype; None if everywhere."""
    if rule.precond_min is None:
        return None
    u = path if p.gamma is None else path * p.gamma.unsqueeze(-1)
    inside = _inside(torch.addcmul(u, p.z, x, value=rule.eta), rule)
    return None if bool(inside.all()) else inside.to(path.dtype)


def _left_box(passed: Tensor) -> Tensor | None:
    rows = (passed.flatten(1).amin(1) == 0).nonzero()[:, 0]
    return rows if len(rows) else None


def _scan_back(
    dd: Tensor, z: Tensor, gamma: Tensor | None, passed: Tensor, lam: Tensor, eta: float
) -> tuple[Tensor, Tensor]:
    """The reverse recurrence token by token over one chunk: (g [R, C, K], lam at its start).

    g_t = λ_{t+1} ⊙ passed_t,  λ_t = dd_t + γ_t g_t − η ⟨g_t, z_t⟩ z_t.
    """
    dd, z, passed = (y.transpose(0, 1).contiguous() for y in (dd, z, passed))
    after = torch.empty_like(passed)
    gammas = None if gamma is None else gamma.t().unsqueeze(-1).unbind(0)
    steps = list(zip(dd.unbind(0), z.unbind(0), passed.unbind(0), after.unbind(0)))
    lam = lam.clone()
    for t in reversed(range(len(steps))):
        dd_t, z_t, passed_t, g = steps[t]
        torch.mul(lam, passed_t, out=g)
        a = torch.linalg.vecdot(g, z_t).unsqueeze(-1)
        torch.addcmul(dd_t, a, z_t, value=-eta, out=lam)
        if gammas is None:
            lam.add_(g)
        else:
            lam.addcmul_(g, gammas[t])
    return after.transpose(0, 1), lam


def _token_gradients(
    p: Prepared, path: Tensor, x: Tensor, after: Tensor, eta: float
) -> tuple[Tensor, Tensor | None]:
    """(dz, dlog_gamma) from λ_{t+1} (masked by the clip) of every token."""
    a = torch.linalg.vecdot(after, p.z).unsqueeze(-1)
    dlog_gamma = None if p.gamma is None else torch.linalg.vecdot(after, path).mul_(p.gamma)
    dz = after.mul_(x).addcmul_(a, path, value=-1).mul_(eta)
    return dz, dlog_gamma
