"""Phase 1 of the chunkwise backend: the path of the preconditioner and its gradient.

With z_t = b_t s_t the recurrence of one row is x_t = 1 − ⟨d_t, z_t⟩, d_{t+1} = γ_t d_t + η x_t z_t,
projected onto the box. Within a chunk of C tokens let P[r, c] = Π_{r≤i<c} γ_i for r ≤ c, else 0
(1 ≤ r, c ≤ C + 1): what is left of d_r in d_c. Without the box the column x obeys

    (I + L) x = 1 − P[1, t] ⟨d_1, z_t⟩                    L[t, j] = η ⟨z_j, z_t⟩ P[j+1, t], j < t
    d_t       = P[1, t] d_1 + Σ_{j<t} P[j+1, t] η x_j z_j

so that from chunk to chunk only two row-by-matrix products and a triangular solve for one vector
are sequential. A path that stays in the box is exact (by induction over t); a row that leaves it is
run again token by token from the start of the chunk.

Gradient, with λ_t = dL/dd_t along the whole recurrence, g_t the direct gradient of d_t, g_{C+1} the
λ that enters at the chunk's end, and a_t = ⟨λ_{t+1}, z_t⟩:

    (I + L)ᵀ a = Σ_{i>t} P[t+1, i] ⟨g_i, z_t⟩
    λ_{t+1}    = Σ_{i>t} P[t+1, i] (g_i − [i≤C] η a_i z_i)
    dz_t       = η (x_t λ_{t+1} − a_t d_t)                dlog γ_t = γ_t ⟨λ_{t+1}, d_t⟩

Rows are [R, C, ·] as in osdn.ops.varlen; a vector over a chunk is kept as a row, [R, 1, C], which
products take far faster than a column. Source of the recurrence: arXiv 2605.13473; the chunked form
is derived in docs/operator.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import solve_triangular as solve

from osdn.ops.rule import Rule
from osdn.ops.varlen import first_rows


class Chunks(NamedTuple):
    """What needs no start, for all chunks of a group at once.

    z: [R, C, K].  gamma: [R, C], or None for γ = 1.  kept: P, [R, C+1, C+1].
    sizes: the number of rows of each step in turn.
    x: [R, 1, C], and L: [R, C, C], of which only what lies below the diagonal counts: both written
    by forward and read by backward.
    """

    z: Tensor
    gamma: Tensor | None
    kept: Tensor
    sizes: list[int]
    x: Tensor
    L: Tensor

    def rows(self) -> list[slice]:
        """The rows of each step."""
        stops = [sum(self.sizes[: n + 1]) for n in range(len(self.sizes))]
        return [slice(stop - size, stop) for stop, size in zip(stops, self.sizes)]

    def at(self, rows: slice) -> Chunks:
        """One step by itself."""
        gamma = None if self.gamma is None else self.gamma[rows]
        z, kept, x, L = (y[rows] for y in (self.z, self.kept, self.x, self.L))
        return Chunks(z, gamma, kept, [len(z)], x, L)

    def fading(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """(P[1, t], P[t+1, C+1], P[1, C+1]) as rows [R, 1, ·]; None for γ = 1."""
        if self.gamma is None:
            return None
        kept = self.kept
        return kept[:, :1, :-1], kept[:, 1:, -1].unsqueeze(1), kept[:, :1, -1:]


def prepare(z: Tensor, log_gamma: Tensor | None, sizes: list[int], x: Tensor, L: Tensor) -> Chunks:
    """The parallel part over z [R, C, K] and log_gamma [R, C], with R = sum(sizes), but x and L."""
    R, C, _ = z.shape
    if log_gamma is None:
        gamma, kept = None, z.new_ones(C + 1, C + 1).triu_().expand(R, -1, -1)
    else:
        # Products of γ over each stretch, never quotients of products, which may be 0 over 0.
        within = torch.ones(C + 1, C, dtype=torch.bool, device=z.device).triu_()
        gamma, kept = log_gamma.exp(), z.new_ones(R, C + 1, C + 1)
        torch.cumprod(torch.where(within, gamma[:, None, :], 1), -1, out=kept[:, :, 1:])
        kept.triu_()
    return Chunks(z, gamma, kept, sizes, x, L)


def forward(p: Chunks, path: Tensor, d: Tensor, rule: Rule) -> bool:
    """Write x, L and d_1..d_C of every chunk, path [R, C, K]; whether the clip may have acted.

    d [N·H, K] goes to the end of the group.
    """
    p.L.baddbmm_(p.z, p.z.mT, beta=0, alpha=rule.eta)
    if p.gamma is not None:
        p.L.mul_(p.kept[:, 1:, :-1].mT)
    start = None if rule.precond_min is None else d.clone()
    _without_box(p, path, d, rule.eta)
    if start is None or (_inside(path, rule) and _inside(d, rule)):
        return False
    d.copy_(start)
    for rows in p.rows():
        _with_box(p.at(rows), path[rows], d, rule)
    return True


def _without_box(p: Chunks, path: Tensor, d: Tensor, eta: float) -> None:
    """path = d_1..d_C as if there were no box; d moves on."""
    fading, x = p.fading(), p.x.fill_(1)
    terms, one = path if fading is None else torch.empty_like(path), x.new_ones(())
    pieces = (p.z, p.z.mT, p.L, x, x.mT, terms[:, :1], *(fading or ()))
    steps = zip(first_rows(d.unsqueeze(1), p.sizes), *(y.split(p.sizes) for y in pieces))
    for now, z_n, zt_n, L_n, x_n, column_n, start, *fading_n in steps:
        start.copy_(now)
        if not fading_n:
            x_n.baddbmm_(now, zt_n, alpha=-1)
        else:
            torch.addcmul(one, torch.bmm(now, zt_n), fading_n[0], value=-1, out=x_n)
        solve(L_n, column_n, upper=False, unitriangular=True, out=column_n)
        if not fading_n:
            now.baddbmm_(x_n, z_n, alpha=eta)
        else:
            now.mul_(fading_n[2]).baddbmm_(x_n * fading_n[1], z_n, alpha=eta)
    torch.mul(p.z[:, :-1], (x * eta).mT[:, :-1], out=terms[:, 1:])
    if fading is None:
        terms.cumsum_(1)
    else:
        torch.bmm(p.kept[:, :-1, :-1].mT, terms, out=path)


def _with_box(p: Chunks, path: Tensor, d: Tensor, rule: Rule) -> None:
    """The path of one step with the box; d moves on."""
    n = len(p.z)
    start = d[:n].clone()
    _without_box(p, path, d, rule.eta)
    inside = _passing(path[:, 1:], rule).flatten(1).all(1) & _passing(d[:n], rule).all(1)
    bad = inside.logical_not_().nonzero()[:, 0]
    if len(bad):
        gamma = None if p.gamma is None else p.gamma[bad]
        tokens = _scan(p.z[bad], gamma, start[bad], rule)
        repaired = tokens[:-1].transpose(0, 1)
        path.index_copy_(0, bad, repaired)
        p.x.index_copy_(0, bad, 1 - torch.linalg.vecdot(repaired, p.z[bad]).unsqueeze(1))
        d.index_copy_(0, bad, tokens[-1])


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
    p: Chunks, path: Tensor, g: Tensor, lam: Tensor, rule: Rule, clipped: bool
) -> tuple[Tensor, Tensor | None]:
    """(dz [R, C, K], dlog_gamma [R, C] or None) of a group of chunks, from its end to its start.

    path: d_1..d_C, [R, C, K].  g: the gradient of each d_t from its own write, and a row to work
    in: [R, C+1, K]; overwritten.  lam: [N·H, K] dL/dd at the end of the group; becomes that at its
    start.  clipped: as forward said.
    """
    z, eta, fading = p.z, rule.eta, p.fading()
    dd, ends = g[:, :-1], g[:, -1:]
    passed = _passed(p, path, rule) if clipped else None
    a = torch.bmm(z, dd.mT).mul_(p.kept[:, 1:, :-1]).sum(-1).unsqueeze(1)
    direct = torch.bmm(p.kept[:, :1, :-1], dd)
    repairs = []
    pieces = (z, z.mT, p.L, a, direct, ends, *(fading or ()))
    views = (y.split(p.sizes) for y in pieces)
    steps = list(zip(p.rows(), first_rows(lam.unsqueeze(1), p.sizes), *views))
    for rows, now, z_n, zt_n, L_n, a_n, direct_n, end_n, *fading_n in reversed(steps):
        end_n.copy_(now)
        if not fading_n:
            a_n.baddbmm_(now, zt_n)
        else:
            a_n.addcmul_(torch.bmm(now, zt_n), fading_n[1])
        solve(L_n, a_n, upper=False, left=False, unitriangular=True, out=a_n)
        if not fading_n:
            now.add_(direct_n).baddbmm_(a_n, z_n, alpha=-eta)
        else:
            now.mul_(fading_n[2]).add_(direct_n).baddbmm_(a_n * fading_n[0], z_n, alpha=-eta)
        if passed is not None:
            bad = _left_box(passed[rows])
            if len(bad):
                at = bad + rows.start
                gamma = None if p.gamma is None else p.gamma[at]
                later, start = _scan_back(dd[at], z[at], gamma, passed[at], g[at, -1], eta)
                lam.index_copy_(0, bad, start)
                repairs.append((at, later))
    dd.addcmul_(z, a.mT, value=-eta)
    later = torch.bmm(p.kept[:, 1:, 1:], g[:, 1:])
    for at, repaired in repairs:
        later.index_copy_(0, at, repaired)
        a.index_copy_(0, at, torch.linalg.vecdot(repaired, z[at]).unsqueeze(1))
    dlog_gamma = None if p.gamma is None else torch.linalg.vecdot(later, path).mul_(p.gamma)
    return later.mul_((p.x * eta).mT).addcmul_(path, a.mT, value=-eta), dlog_gamma


def _passed(p: Chunks, path: Tensor, rule: Rule) -> Tensor | None:
    """1 where clip passed u = γ d + η x z unchanged, else 0, in z's dtype; None if everywhere."""
    u = path if p.gamma is None else path * p.gamma.unsqueeze(-1)
    passing = _passing(torch.addcmul(u, p.z, p.x.mT, value=rule.eta), rule)
    return None if bool(passing.all()) else passing.to(path.dtype)


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


def _passing(u: Tensor, rule: Rule) -> Tensor:
    """Where u is in the box."""
    assert rule.precond_min is not None and rule.precond_max is not None
    return (u >= rule.precond_min).logical_and_(u <= rule.precond_max)


def _inside(u: Tensor, rule: Rule) -> bool:
    """Whether all of u is in the box (a NaN is not)."""
    assert rule.precond_min is not None and rule.precond_max is not None
    least, most = torch.aminmax(u)
    return bool((least >= rule.precond_min) & (most <= rule.precond_max))
