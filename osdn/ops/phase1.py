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

# Side of the blocks that are inverted by substitution, which is slow for batches.
SUBSTITUTED = 16


class Prepared(NamedTuple):
    """What needs no start, for all chunks of a group at once.

    z: [R, C, K].  gamma: [R, C], or None for γ = 1.  kept: P, [R, C+1, C+1].
    inverse: (I + U)⁻¹, [R, C, C].  sizes: the number of rows of each step in turn.
    """

    z: Tensor
    gamma: Tensor | None
    kept: Tensor
    inverse: Tensor
    sizes: list[int]

    def rows(self) -> list[slice]:
        """The rows of each step."""
        stops = [sum(self.sizes[: n + 1]) for n in range(len(self.sizes))]
        return [slice(stop - size, stop) for stop, size in zip(stops, self.sizes)]

    def at(self, rows: slice) -> Prepared:
        """One step by itself."""
        gamma = None if self.gamma is None else self.gamma[rows]
        z, kept, inverse = self.z[rows], self.kept[rows], self.inverse[rows]
        return Prepared(z, gamma, kept, inverse, [len(z)])


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
    """(I + U)⁻¹ for strictly upper triangular U, [R, C, C]: by halves, and by substitution at 16.

    The upper right block of the inverse is −A⁻¹ U₁₂ D⁻¹, A and D the diagonal blocks.
    """
    R, C, _ = U.shape
    if C <= SUBSTITUTED:
        eye = torch.eye(C, dtype=U.dtype, device=U.device).expand_as(U)
        return torch.linalg.solve_triangular(U, eye, upper=True, unitriangular=True)
    half = C // 2
    first, second = slice(half), slice(half, None)
    blocks = U.new_empty(2, R, half, half)
    blocks[0], blocks[1] = U[:, first, first], U[:, second, second]
    A, D = unit_upper_inverse(blocks.flatten(0, 1)).view_as(blocks)
    inverse = torch.zeros_like(U)
    inverse[:, first, first], inverse[:, second, second] = A, D
    inverse[:, first, second] = torch.bmm(torch.bmm(A, U[:, first, second]), D).neg_()
    return inverse


def prepare(z: Tensor, log_gamma: Tensor | None, sizes: list[int], eta: float) -> Prepared:
    """The parallel part over z [R, C, K] and log_gamma [R, C], with R = sum(sizes)."""
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
    return Prepared(z, gamma, kept, unit_upper_inverse(U), sizes)


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
    first = p.sizes[0]
    reached = path[:, 1:], path[first:, 0], d[:first]
    if all(bool(_inside(y, rule).all()) for y in reached):
        return path
    d.copy_(start)
    for rows in p.rows():
        path[rows] = _repaired(p.at(rows), affine.at(rows), d, rule)
    return path


def _without_box(p: Prepared, affine: Affine, d: Tensor, rule: Rule) -> Tensor:
    """d_1..d_C as if there were no box; d moves on."""
    x = torch.empty_like(affine.constant)
    terms = torch.empty_like(p.z)
    pieces = (affine.constant, affine.slope, affine.gain, x, terms[:, :1])
    whole = None if affine.whole is None else affine.whole.split(p.sizes)
    for n, views in enumerate(zip(*(y.split(p.sizes) for y in pieces))):
        constant, slope, gain, x_n, start = views
        now = d[: len(gain)].unsqueeze(1)
        start.copy_(now)
        torch.baddbmm(constant, now, slope, alpha=-1, out=x_n)
        if whole is not None:
            now.mul_(whole[n])
        now.baddbmm_(x_n, gain, alpha=rule.eta)
    torch.mul(p.z[:, :-1], x.mul_(rule.eta).mT[:, :-1], out=terms[:, 1:])
    return torch.bmm(p.kept[:, :-1, :-1].mT, terms)


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
    x = torch.linalg.vecdot(path, z).neg_().add_(1).unsqueeze(-1)
    passed = _passed(p, path, x, rule)
    g = torch.cat((dd[:, 1:], torch.zeros_like(dd[:, :1])), 1)
    a = torch.linalg.vecdot(torch.bmm(p.kept[:, 1:, 1:], g), z).unsqueeze(1)
    a = torch.bmm(a, p.inverse.mT)
    arriving = torch.bmm((z if plain else z * p.kept[:, 1:, -1:]).mT, p.inverse.mT)
    leaving = z if plain else z * p.kept[:, 0, :-1, None]
    direct = torch.bmm(p.kept[:, :1, :-1], dd)
    repairs = []
    pieces = (a, arriving, leaving, direct, g[:, -1:], p.kept[:, :1, -1:])
    for rows, *views in reversed(list(zip(p.rows(), *(y.split(p.sizes) for y in pieces)))):
        a_n, arriving_n, leaving_n, direct_n, end, whole = views
        now = lam[: len(a_n)].unsqueeze(1)
        end.copy_(now)
        a_n.baddbmm_(now, arriving_n)
        if not plain:
            now.mul_(whole)
        now.add_(direct_n).baddbmm_(a_n, leaving_n, alpha=-eta)
        if passed is not None:
            bad = _left_box(passed[rows])
            if len(bad):
                at = bad + rows.start
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
