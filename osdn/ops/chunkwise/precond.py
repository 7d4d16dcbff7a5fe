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

Rows are [R, C, ·] as in `layout`; a vector over a chunk is kept as a row, [R, 1, C], which
products take far faster than a column. Source of the recurrence: arXiv 2605.13473; the chunked form
is derived in docs/explanation/operator.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import solve_triangular as solve

from osdn.ops.chunkwise.layout import first_rows
from osdn.ops.chunkwise.retention import stretches
from osdn.ops.operands import Options


class Chunks(NamedTuple):
    """What needs no start, for all chunks of a group at once.

    z: [R, C, K].  gamma: [R, C], or None for γ = 1.  sizes: the number of rows of each step in
    turn.  Written by forward and read by backward, x: η x, [R, 1, C]; L: [R, C, C], of which only
    what lies below the diagonal counts; kept: P, [R, C+1, C+1], or None for γ = 1.
    """

    z: Tensor
    gamma: Tensor | None
    sizes: list[int]
    x: Tensor
    L: Tensor
    kept: Tensor | None = None

    def rows(self) -> list[slice]:
        """The rows of each step."""
        stops = [sum(self.sizes[: n + 1]) for n in range(len(self.sizes))]
        return [slice(stop - size, stop) for stop, size in zip(stops, self.sizes)]

    def at(self, rows: slice) -> Chunks:
        """One step by itself."""
        gamma, kept = (None if y is None else y[rows] for y in (self.gamma, self.kept))
        z, x, L = (y[rows] for y in (self.z, self.x, self.L))
        return Chunks(z, gamma, [len(z)], x, L, kept)

    def read(self) -> Tensor:
        """z_t P[1, t], with which d at a chunk's start acts on x_t."""
        return self.z if self.kept is None else self.z * self.kept[:, 0, :-1, None]

    def write(self) -> Tensor:
        """P[t+1, C+1] z_t, with which η x_t acts on d at a chunk's end."""
        return self.z if self.kept is None else self.z * self.kept[:, 1:, -1:]

    def decay(self) -> list[Tensor | None]:
        """P[1, C+1] of each step, [N·H, 1, 1]; None for γ = 1."""
        if self.kept is None:
            return [None] * len(self.sizes)
        return list(self.kept[:, :1, -1:].split(self.sizes))


def _prepare(p: Chunks, eta: float) -> None:
    """Write L and P, the parallel part."""
    p.L.baddbmm_(p.z, p.z.mT, beta=0, alpha=eta)  # [R, C, K] [R, K, C]
    if p.gamma is not None and p.kept is not None:
        # P, [R, C+1, C+1]; of it L takes P[j+1, t]
        p.L.mul_(stretches(p.gamma, p.kept)[:, 1:, :-1].mT)


def forward(p: Chunks, path: Tensor, d: Tensor, options: Options) -> bool:
    """Write x, L, P and d_1..d_C of every chunk, path [R, C, K]; whether the clip may have acted.

    d [N·H, K] goes to the end of the group.
    """
    _prepare(p, options.eta)
    # Most paths never leave the box. So take the one without it, then look.
    start = None if options.precond_min is None else d.clone()
    # One pass over the group, [R, C, K], and one look; only a violation costs more.
    _without_box(p, path, d, options.eta)
    if start is None or (_inside(path, options) and _inside(d, options)):
        return False
    # Some chunk left it, and with it all later ones start elsewhere: again, step by step.
    d.copy_(start)
    for rows in p.rows():
        _with_box(p.at(rows), path[rows], d, options)
    return True


def _without_box(p: Chunks, path: Tensor, d: Tensor, eta: float) -> None:
    """path = d_1..d_C as if there were no box; d moves on."""
    # x starts as η, so that the solve below gives η x. Without γ the terms are summed in place.
    x, terms = p.x.fill_(eta), path if p.kept is None else torch.empty_like(path)
    # [R, K, C], [R, C, C], [R, 1, C], [R, C, 1], [R, C, K], [R, 1, K]
    pieces = (p.read().mT, p.L, x, x.mT, p.write(), terms[:, :1])
    views = (y.split(p.sizes) for y in pieces)
    steps = zip(first_rows(d.unsqueeze(1), p.sizes), p.decay(), *views)
    for now, decay, read_n, L_n, x_n, column_n, write_n, start in steps:
        start.copy_(now)  # d_1, [r, 1, K]
        x_n.baddbmm_(now, read_n, alpha=-eta)  # η (1 − P[1, t] ⟨d_1, z_t⟩): [r, 1, K] [r, K, C]
        # (I + L) x = that, [r, C, C] [r, C, 1]; column_n is x_n seen as a column.
        solve(L_n, column_n, upper=False, unitriangular=True, out=column_n)
        if decay is not None:
            now.mul_(decay)  # P[1, C+1], [r, 1, 1]
        now.baddbmm_(x_n, write_n)  # [r, 1, C] [r, C, K]
    # terms: d_1, then what each token but the last adds, η x_t z_t, [R, C, K].
    torch.mul(p.z[:, :-1], x.mT[:, :-1], out=terms[:, 1:])
    if p.kept is None:
        # γ = 1: every term stays whole, so d_t is the running sum.
        terms.cumsum_(1)
    else:
        torch.bmm(p.kept[:, :-1, :-1].mT, terms, out=path)  # [R, C, C] [R, C, K]


def _with_box(p: Chunks, path: Tensor, d: Tensor, options: Options) -> None:
    """The path of one step with the box; d moves on."""
    n = len(p.z)
    start = d[:n].clone()
    _without_box(p, path, d, options.eta)
    # [r]: d_2..d_C lie in path, d_{C+1} in d. d_1 is given, and no clip acts on it.
    inside = _passing(path[:, 1:], options).flatten(1).all(1) & _passing(d[:n], options).all(1)
    bad = inside.logical_not_().nonzero()[:, 0]  # [n], the rows to repair
    if len(bad):
        gamma = None if p.gamma is None else p.gamma[bad]
        tokens = _scan(p.z[bad], gamma, start[bad], options)  # [C+1, n, K]
        repaired = tokens[:-1].transpose(0, 1)
        path.index_copy_(0, bad, repaired)
        # The backward reads η x: of the repaired path, not of the one without the box.
        x = 1 - torch.linalg.vecdot(repaired, p.z[bad])
        p.x.index_copy_(0, bad, x.mul_(options.eta).unsqueeze(1))
        d.index_copy_(0, bad, tokens[-1])


def _scan(z: Tensor, gamma: Tensor | None, start: Tensor, options: Options) -> Tensor:
    """The recurrence token by token over one chunk, z [R, C, K]: d_1..d_{C+1}, [C+1, R, K]."""
    z = z.transpose(0, 1).contiguous()  # [C, R, K]: a token's rows lie together
    path = z.new_empty(z.shape[0] + 1, *z.shape[1:])
    path[0] = start
    pushes = (z * options.eta).unbind(0)  # C times [R, K]
    gammas = None if gamma is None else gamma.t().unsqueeze(-1).unbind(0)  # C times [R, 1]
    states, u = path.unbind(0), torch.empty_like(start)
    for t, z_t in enumerate(z.unbind(0)):
        now = states[t]
        dot = torch.linalg.vecdot(now, z_t).unsqueeze(-1)  # ⟨d_t, z_t⟩, [R, 1]
        # u = γ d + η z − η ⟨d, z⟩ z, which is γ d + η x z without x's own rounding.
        if gammas is None:
            torch.add(now, pushes[t], out=u)
        else:
            torch.addcmul(pushes[t], now, gammas[t], out=u)
        u.addcmul_(dot, z_t, value=-options.eta)
        # d_{t+1}, [R, K]
        torch.clamp(u, options.precond_min, options.precond_max, out=states[t + 1])
    return path


def backward(
    p: Chunks, path: Tensor, g: Tensor, out: Tensor, lam: Tensor, options: Options, clipped: bool
) -> tuple[Tensor, Tensor | None]:
    """(dz [R, C, K], dlog_gamma [R, C] or None) of a group of chunks, from its end to its start.

    path: d_1..d_C, [R, C, K].  g: the gradient of each d_t from its own write, alike; overwritten.
    out: where dz goes.  lam: [N·H, K] dL/dd at the end of the group; becomes that at its start.
    clipped: as forward said.
    """
    z, eta, ends = p.z, options.eta, g.new_empty(len(g), 1, g.shape[-1])
    passed = _passed(p, path, options) if clipped else None  # [R, C, K], or None
    # Σ_i P[1, i] g_i, [R, 1, K]: what the writes of the chunk ask of its d_1.
    direct = g.sum(1, keepdim=True) if p.kept is None else torch.bmm(p.kept[:, :1, :-1], g)
    a = torch.bmm(z, g.mT)  # what becomes η a, [R, 1, C]
    # ⟨z_t, g_i⟩ [R, C, C], only for i > t, and times P[t+1, i].
    a = a.triu_(1) if p.kept is None else a.mul_(p.kept[:, 1:, :-1])
    a = a.sum(-1).mul_(eta).unsqueeze(1)  # over i
    repairs = []
    # L as the upper triangle of a left side: the same with left=False takes three times as long.
    pieces = (p.write().mT, p.L.mT, a, a.mT, p.read(), direct, ends)
    views = (y.split(p.sizes) for y in pieces)
    steps = list(zip(p.rows(), first_rows(lam.unsqueeze(1), p.sizes), p.decay(), *views))
    for rows, now, decay, write_n, Lt_n, a_n, column_n, read_n, direct_n, end in reversed(steps):
        end.copy_(now)  # g_{C+1}, [r, 1, K], which _later reads
        a_n.baddbmm_(now, write_n, alpha=eta)  # [r, 1, K] [r, K, C]
        # (I + L)ᵀ a = that, [r, C, C] [r, C, 1]
        solve(Lt_n, column_n, upper=True, unitriangular=True, out=column_n)
        if decay is not None:
            now.mul_(decay)
        now.add_(direct_n).baddbmm_(a_n, read_n, alpha=-1)  # λ_1: [r, 1, C] [r, C, K]
        # Where the clip stopped a gradient, the closed form is wrong: those rows token by token.
        if passed is not None:
            bad = _left_box(passed[rows])
            if len(bad):
                at = bad + rows.start  # among the group's rows
                gamma = None if p.gamma is None else p.gamma[at]
                repaired, start = _scan_back(g[at], z[at], gamma, passed[at], ends[at, 0], eta)
                # The earlier chunks of these rows go on from the λ that is right.
                lam.index_copy_(0, bad, start)
                repairs.append((at, repaired))
    later = _later(p, g.addcmul_(z, a.mT, value=-1), ends, out)  # λ_{t+1}, [R, C, K]
    for at, repaired in repairs:
        later.index_copy_(0, at, repaired)
        a.index_copy_(0, at, torch.linalg.vecdot(repaired, z[at]).mul_(eta).unsqueeze(1))
    # γ_t ⟨λ_{t+1}, d_t⟩, [R, C]
    dlog_gamma = None if p.gamma is None else torch.linalg.vecdot(later, path).mul_(p.gamma)
    # x holds η x and a holds η a, [R, 1, C] each.
    return later.mul_(p.x.mT).addcmul_(path, a.mT, value=-1), dlog_gamma


def _later(p: Chunks, g: Tensor, ends: Tensor, out: Tensor) -> Tensor:
    """Σ_{i>t} P[t+1, i] g_i for every t, [R, C, K], in `out`, with g_{C+1} = ends, [R, 1, K]."""
    if p.kept is None:
        # γ = 1: the sum over later tokens is the total less the sum up to t.
        torch.cumsum(g, 1, out=out)
        return torch.sub(out[:, -1:] + ends, out, out=out)
    torch.bmm(p.kept[:, 1:, :-1], g, out=out)  # [R, C, C] [R, C, K]
    return out.addcmul_(p.kept[:, 1:, -1:], ends)


def _passed(p: Chunks, path: Tensor, options: Options) -> Tensor | None:
    """1 where clip passed u = γ d + η x z unchanged, else 0, in z's dtype; None if everywhere."""
    u = path if p.gamma is None else path * p.gamma.unsqueeze(-1)  # γ d, [R, C, K]
    # From the d and η x that the forward saved, in the accumulation dtype: a rounded d would lie.
    passing = _passing(torch.addcmul(u, p.z, p.x.mT), options)
    return None if bool(passing.all()) else passing.to(path.dtype)


def _left_box(passed: Tensor) -> Tensor:
    return (passed.flatten(1).amin(1) == 0).nonzero()[:, 0]  # [n]


def _scan_back(
    g: Tensor, z: Tensor, gamma: Tensor | None, passed: Tensor, lam: Tensor, eta: float
) -> tuple[Tensor, Tensor]:
    """The reverse recurrence token by token over one chunk: (clipped λ_{t+1} [R, C, K], λ_1).

    l_t = λ_{t+1} ⊙ passed_t,  λ_t = g_t + γ_t l_t − η ⟨l_t, z_t⟩ z_t.
    """
    g, z, passed = (y.transpose(0, 1).contiguous() for y in (g, z, passed))  # [C, R, K]
    clipped = torch.empty_like(passed)
    gammas = None if gamma is None else gamma.t().unsqueeze(-1).unbind(0)
    tokens = list(zip(g.unbind(0), z.unbind(0), passed.unbind(0), clipped.unbind(0)))
    for t in reversed(range(len(tokens))):
        g_t, z_t, passed_t, l_t = tokens[t]
        # The clip first, since it came last in the forward.
        torch.mul(lam, passed_t, out=l_t)
        a = torch.linalg.vecdot(l_t, z_t).unsqueeze(-1)  # [R, 1]
        torch.addcmul(g_t, a, z_t, value=-eta, out=lam)
        if gammas is None:
            lam.add_(l_t)
        else:
            lam.addcmul_(l_t, gammas[t])
    return clipped.transpose(0, 1), lam


def _passing(u: Tensor, options: Options) -> Tensor:
    """Where u is in the box."""
    assert options.precond_min is not None and options.precond_max is not None
    return (u >= options.precond_min).logical_and_(u <= options.precond_max)


def _inside(u: Tensor, options: Options) -> bool:
    """Whether all of u is in the box (a NaN is not)."""
    assert options.precond_min is not None and options.precond_max is not None
    least, most = torch.aminmax(u)
    return bool((least >= options.precond_min) & (most <= options.precond_max))
