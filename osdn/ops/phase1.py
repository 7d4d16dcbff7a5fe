"""Phase 1 of the chunkwise backend: the path of the preconditioner and its gradient.

With z_t = b_t s_t the recurrence of one row is x_t = 1 − ⟨d_t, z_t⟩, d_{t+1} = γ_t d_t + η x_t z_t,
projected onto the box. Within a chunk of C tokens let P[r, c] = Π_{r≤i<c} γ_i for r ≤ c, else 0
(1 ≤ r, c ≤ C + 1): what is left of d_r in d_c. Without the box the row vector x obeys

    x (I + U) = 1 − P[1, t] ⟨d_1, z_t⟩                    U[j, t] = η ⟨z_j, z_t⟩ P[j+1, t], j < t
    d_t       = P[1, t] d_1 + Σ_{j<t} P[j+1, t] η x_j z_j

so only two row-by-matrix products a chunk are sequential. A path that stays in the box is exact (by
induction over t); a row that leaves it is run again token by token from the start of the chunk.

Gradient, with λ_t = dL/dd_t along the whole recurrence, g_t the direct gradient of d_t, g_{C+1} the
λ that enters at the chunk's end, and a_t = ⟨λ_{t+1}, z_t⟩:

    a (I + U)ᵀ = Σ_{i>t} P[t+1, i] ⟨g_i, z_t⟩
    λ_{t+1}    = Σ_{i>t} P[t+1, i] (g_i − [i≤C] η a_i z_i)
    dz_t       = η (x_t λ_{t+1} − a_t d_t)                dlog γ_t = γ_t ⟨λ_{t+1}, d_t⟩

Rows are [R, C, ·] as in osdn.ops.varlen. Source of the recurrence: arXiv 2605.13473; the chunked
form is derived in docs/operator.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from osdn.ops.rule import Rule

# Tokens a chunk of phase 1: less work in products, more steps, than with the memory's chunks.
CHUNK = 16


class Prepared(NamedTuple):
    """What needs no start, for all chunks of a group at once.

    z: [R, C, K].  gamma: [R, C], or None for γ = 1.  kept: P, [R, C+1, C+1].
    inverse: (I + U)⁻¹, [R, C, C].  steps: the rows of each step in turn.
    """

    z: Tensor
    gamma: Tensor | None
    kept: Tensor
    inverse: Tensor
    steps: list[slice]

    def at(self, rows: slice) -> Prepared:
        """One step by itself."""
        gamma = None if self.gamma is None else self.gamma[rows]
        z, kept, inverse = self.z[rows], self.kept[rows], self.inverse[rows]
        return Prepared(z, gamma, kept, inverse, [slice(len(z))])


class Affine(NamedTuple):
    """A chunk without the box: x = constant − d_1 slope, d_{C+1} = whole d_1 + η x gain.

    constant: [R, 1, C].  slope: [R, K, C].  gain: [R, C, K].  whole: [R, 1, 1] or None for 1.
    """

    constant: Tensor
    slope: Tensor
    gain: Tensor
    whole: Tensor | None

    def at(self, rows: slice) -> Affine:
        """One step by itself."""
        whole = None if self.whole is None else self.whole[rows]
        return Affine(self.constant[rows], self.slope[rows], self.gain[rows], whole)


def unit_upper_inverse(U: Tensor) -> Tensor:
    """(I + U)⁻¹ for strictly upper triangular U, [R, C, C]."""
    eye = torch.eye(U.shape[-1], dtype=U.dtype, device=U.device).expand_as(U)
    return torch.linalg.solve_triangular(U, eye, upper=True, unitriangular=True)


def prepare(z: Tensor, log_gamma: Tensor | None, sizes: list[int], eta: float) -> Prepared:
    """The parallel part over z [R, C, K] and log_gamma [R, C], with R = sum(sizes).

    The memory's chunks are cut into m = C / CHUNK parts: row r becomes rows m·r to m·r + m − 1.
    """
    parts = max(z.shape[1] // CHUNK, 1)
    z = z.reshape(len(z) * parts, -1, z.shape[-1])
    log_gamma = None if log_gamma is None else log_gamma.reshape(z.shape[:2])
    steps, start = [], 0
    for size in sizes:
        stop = start + size * parts
        steps += [slice(start + part, stop, parts) for part in range(parts)]
        start = stop
    R, C, _ = z.shape
    if log_gamma is None:
        gamma, kept = None, z.new_ones(C + 1, C + 1).triu_().expand(R, -1, -1)
    else:
        # Sums of log γ over each stretch, never differences of sums: after one large term those
        # have lost the digits of the small ones.
        within = torch.ones(C + 1, C, dtype=torch.bool, device=z.device).triu_()
        sums = torch.where(within, log_gamma[:, None, :], 0).cumsum_(-1)
        gamma, kept = log_gamma.exp(), z.new_ones(R, C + 1, C + 1)
        kept[:, :, 1:] = sums.exp_()
        kept.triu_()
    U = torch.bmm(z, z.mT).mul_(kept[:, 1:, :-1]).mul_(eta)
    return Prepared(z, gamma, kept, unit_upper_inverse(U), steps)


def forward(p: Prepared, d: Tensor, rule: Rule) -> Tensor:
    """The path d_1..d_C of every chunk, [R, C, K]; d [N·H, K] goes to the end of the group."""
    plain = p.gamma is None
    affine = Affine(
        constant=p.inverse.sum(-2, keepdim=True),
        slope=torch.bmm((p.z if plain else p.z * p.kept[:, 0, :-1, None]).mT, p.inverse),
        gain=p.z if plain else p.z * p.kept[:, 1:, -1:],
        whole=None if plain else p.kept[:, :1, -1:],
    )
    if rule.precond_min is None:
        return _without_box(p, affine, d, rule)
    start = d.clone()
    path = _without_box(p, affine, d, rule)
    if _stays(path, p.steps[0], d, rule):
        return path
    d.copy_(start)
    for rows in p.steps:
        path[rows] = _repaired(p.at(rows), affine.at(rows), d, rule)
    return path


def _without_box(p: Prepared, affine: Affine, d: Tensor, rule: Rule) -> Tensor:
    """d_1..d_C as if there were no box; d moves on."""
    x = torch.empty_like(affine.constant)
    terms = torch.empty_like(p.z)
    for rows in p.steps:
        constant, slope, gain, whole = affine.at(rows)
        now = d[: len(gain)].unsqueeze(1)
        terms[rows, :1] = now
        x_now = torch.baddbmm(constant, now, slope, alpha=-1)
        x[rows] = x_now
        if whole is not None:
            now.mul_(whole)
        now.baddbmm_(x_now, gain, alpha=rule.eta)
    torch.mul(p.z[:, :-1], x.mul_(rule.eta).mT[:, :-1], out=terms[:, 1:])
    return torch.bmm(p.kept[:, :-1, :-1].mT, terms)


def _stays(path: Tensor, first: slice, d: Tensor, rule: Rule) -> bool:
    """Whether a group's path, its start apart, and its end d are in the box."""
    starts = path[:, 0].clone()
    starts[first] = starts[first].clamp(rule.precond_min, rule.precond_max)
    reached = path[:, 1:], starts, d[: len(starts[first])]
    return all(bool(_inside(y, rule).all()) for y in reached)


def _repaired(p: Prepared, affine: Affine, d: Tensor, rule: Rule) -> Tensor:
    """The path of one step with the box; d moves on."""
    n = len(p.z)
    start = d[:n].clone()
    path = _without_box(p, affine, d, rule)
    inside = _inside(path[:, 1:], rule).flatten(1).all(1) & _inside(d[:n], rule).all(1)
    bad = inside.logical_not_().nonzero()[:, 0]
    if len(bad):
        gamma = None if p.gamma is None else p.gamma[bad]
        tokens = _scan(p.z[bad], gamma, start[bad], rule)
        path.index_copy_(0, bad, tokens[:-1].transpose(0, 1))
        d.index_copy_(0, bad, tokens[-1])
    return path


def _scan(z: Tensor, gamma: Tensor | None, start: Tensor, rule: Rule) -> Tensor:
    """The recurrence token by token over one chunk, z [R, C, K]: d_1..d_{C+1}, [C+1, R, K]."""
    z = z.transpose(0, 1).contiguous()
    path = z.new_empty(z.shape[0] + 1, *z.shape[1:])
    path[0] = start
    pushes = (z * rule.eta).unbind(0)
    gammas = None if gamma is None else gamma.t().unsqueeze(-1).unbind(0)
    states, u = path.unbind(0), torch.empty_like(start)
    for t, z_t in enumerate(z.unbind(0)):
        now = states[t]
        dot = torch.linalg.vecdot(now, z_t).unsqueeze(-1)
        if gammas is None:
            torch.add(now, pushes[t], out=u)
        else:
            torch.addcmul(pushes[t], now, gammas[t], out=u)
        u.addcmul_(dot, z_t, value=-rule.eta)
        torch.clamp(u, rule.precond_min, rule.precond_max, out=states[t + 1])
    return path


def backward(
    p: Prepared, path: Tensor, dd: Tensor, lam: Tensor, rule: Rule
) -> tuple[Tensor, Tensor | None]:
    """(dz [R, C, K], dlog_gamma [R, C] or None) of a group of chunks, from its end to its start.

    path: d_1..d_C, [R, C, K].  dd: gradient of each d_t from its own write, [R, C, K].
    lam: [N·H, K] dL/dd at the end of the group; becomes that at its start.
    """
    z, eta, plain = p.z, rule.eta, p.gamma is None
    path, dd = path.view_as(z), dd.view_as(z)
    x = torch.linalg.vecdot(path, z).neg_().add_(1).unsqueeze(-1)
    passed = _passed(p, path, x, rule)
    g = torch.cat((dd[:, 1:], torch.zeros_like(dd[:, :1])), 1)
    a = torch.linalg.vecdot(torch.bmm(p.kept[:, 1:, 1:], g), z).unsqueeze(1)
    a = torch.bmm(a, p.inverse.mT)
    arriving = torch.bmm((z if plain else z * p.kept[:, 1:, -1:]).mT, p.inverse.mT)
    leaving = z if plain else z * p.kept[:, 0, :-1, None]
    direct = torch.bmm(p.kept[:, :1, :-1], dd)
    repairs = []
    for rows in reversed(p.steps):
        a_now = a[rows]
        now = lam[: len(a_now)].unsqueeze(1)
        g[rows, -1:] = now
        a_now.baddbmm_(now, arriving[rows])
        if not plain:
            now.mul_(p.kept[rows, :1, -1:])
        now.add_(direct[rows]).baddbmm_(a_now, leaving[rows], alpha=-eta)
        if passed is not None:
            bad = _left_box(passed[rows])
            if len(bad):
                at = bad * (rows.step or 1) + rows.start
                gamma = None if p.gamma is None else p.gamma[at]
                later, start = _scan_back(dd[at], z[at], gamma, passed[at], g[at, -1], eta)
                lam.index_copy_(0, bad, start)
                repairs.append((at, later))
    g[:, :-1].addcmul_(z[:, 1:], a.mT[:, 1:], value=-eta)
    later = torch.bmm(p.kept[:, 1:, 1:], g)
    for at, repaired in repairs:
        later.index_copy_(0, at, repaired)
        a.index_copy_(0, at, torch.linalg.vecdot(repaired, z[at]).unsqueeze(1))
    dlog_gamma = None if p.gamma is None else torch.linalg.vecdot(later, path).mul_(p.gamma)
    return later.mul_(x.mul_(eta)).addcmul_(path, a.mT, value=-eta), dlog_gamma


def _passed(p: Prepared, path: Tensor, x: Tensor, rule: Rule) -> Tensor | None:
    """1 where clip passed u = γ d + η x z unchanged, else 0, in z's dtype; None if everywhere."""
    if rule.precond_min is None:
        return None
    u = path if p.gamma is None else path * p.gamma.unsqueeze(-1)
    inside = _inside(torch.addcmul(u, p.z, x, value=rule.eta), rule)
    return None if bool(inside.all()) else inside.to(path.dtype)


def _left_box(passed: Tensor) -> Tensor:
    return (passed.flatten(1).amin(1) == 0).nonzero()[:, 0]


def _scan_back(
    dd: Tensor, z: Tensor, gamma: Tensor | None, passed: Tensor, lam: Tensor, eta: float
) -> tuple[Tensor, Tensor]:
    """The reverse recurrence token by token over one chunk: (clipped λ_{t+1} [R, C, K], λ_1).

    l_t = λ_{t+1} ⊙ passed_t,  λ_t = dd_t + γ_t l_t − η ⟨l_t, z_t⟩ z_t.
    """
    dd, z, passed = (y.transpose(0, 1).contiguous() for y in (dd, z, passed))
    clipped = torch.empty_like(passed)
    gammas = None if gamma is None else gamma.t().unsqueeze(-1).unbind(0)
    tokens = list(zip(dd.unbind(0), z.unbind(0), passed.unbind(0), clipped.unbind(0)))
    for t in reversed(range(len(tokens))):
        dd_t, z_t, passed_t, l_t = tokens[t]
        torch.mul(lam, passed_t, out=l_t)
        a = torch.linalg.vecdot(l_t, z_t).unsqueeze(-1)
        torch.addcmul(dd_t, a, z_t, value=-eta, out=lam)
        if gammas is None:
            lam.add_(l_t)
        else:
            lam.addcmul_(l_t, gammas[t])
    return clipped.transpose(0, 1), lam


def _inside(u: Tensor, rule: Rule) -> Tensor:
    assert rule.precond_min is not None and rule.precond_max is not None
    return (u >= rule.precond_min).logical_and_(u <= rule.precond_max)
