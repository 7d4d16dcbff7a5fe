"""Phase 2 of the chunkwise backend: the memory over a group of chunks, and its gradient.

Per chunk of C tokens with start state S and write keys w_t = β_t d_t ⊙ k_t:

    E  = (I + tril(k wᵀ, −1))⁻¹          e = E (v − k S)            residuals, [C, V]
    o  = scale · (q S + tril(q wᵀ) e)    S ← S + wᵀ e

Backward with P = tril(q wᵀ), do already times scale and dS the gradient of the chunk's final S:

    z  = Eᵀ (Pᵀ do + w dS)    dP = tril(do eᵀ)    dA = −tril(z eᵀ, −1)
    dq = do Sᵀ + dP w    dk = −z Sᵀ + dA w    dv = z    dw = e dSᵀ + dPᵀ q + dAᵀ k
    dS ← dS + qᵀ do − kᵀ z

With a state decay α let G[i, j] = Π_{j<m≤i} α_m for j ≤ i, a_i = Π_{m≤i} α_m and b_j = Π_{m>j} α_m.
Then k wᵀ and q wᵀ above are taken times G, element by element, as are dP and dA; k S and q S times
a, as are the parts of dq and dk that S gives; and wᵀ e, w dS and e dSᵀ have b ⊙ w in place of w.
S and dS pass a chunk times Π α_m. `retention` has these products and the gradient of log α.

Rows are [R, C, ·] as in `layout`. k and q lie one above the other, [R, 2 C, K], since S
multiplies both, and w both of their gradients: one product in place of two. What needs S or dS is
done step by step, while these are in the cache. E is kept, and S at every chunk's start; to find
them again would cost a quarter of the backward.

Source: arXiv 2406.06484 for the delta rule in chunks (there with v′ = β e and w = k).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from osdn.ops.chunkwise.layout import first_rows
from osdn.ops.chunkwise.retention import Decay, dlog_retention


class Kept(NamedTuple):
    """What the backward wants of all chunks, or of a group's, in the order of the rows.

    e: [R, C, V].  minus_E: −E, [R, C, C].  S: at the chunk's start, [R, K, V].
    """

    e: Tensor
    minus_E: Tensor
    S: Tensor


def forward(
    pair: Tensor,
    minus_v: Tensor,
    w: Tensor,
    S: Tensor,
    kept: Kept,
    scale: float,
    sizes: list[int],
    decay: Decay | None = None,
) -> Tensor:
    """o [R, C, V] of a group; e, −E and S go into `kept`, and S [N·H, K, V] to the group's end.

    pair: k above q, [R, 2 C, K].  minus_v: −v above zeros, [R, 2 C, V]; overwritten.
    """
    # First what needs no memory, for all chunks of the group in one product each.
    C, (e, minus_E, *_) = w.shape[1], kept
    minus_one = torch.eye(C, dtype=w.dtype, device=w.device).neg_().expand_as(minus_E)
    A = torch.bmm(w, pair[:, :C].mT).mT  # k wᵀ, [R, C, C]
    P = torch.bmm(pair[:, C:], w.mT).tril_()  # q wᵀ, [R, C, C]
    if decay is not None:
        A, P = A.mul_(decay.between), P.mul_(decay.between)  # [R, C, C]
    # Only what lies below A's diagonal is read; the unit diagonal is the I of I + tril(A, −1).
    # Into an `out` that lies row by row: a third of the time, since nothing is transposed.
    torch.linalg.solve_triangular(A, minus_one, upper=False, unitriangular=True, out=minus_E)
    at_start, at_end = _decayed(pair, w, decay)  # [R, 2 C, K], [R, C, K]
    reads = minus_v  # [R, 2 C, V], −v above zeros, which the reads of S are added to
    # Then what needs the memory, step by step: S passes from chunk to chunk.
    pieces = (at_start, reads, reads[:, :C], minus_E, e, at_end.mT, kept.S)
    # Views, all made here: a slice in the loop costs as much as a small product.
    steps = zip(first_rows(S, sizes), _whole(decay, sizes), *(x.split(sizes) for x in pieces))
    for now, whole, pair_n, reads_n, error_n, minus_E_n, e_n, wt_n, start_n in steps:
        start_n.copy_(now)  # [r, K, V]
        reads_n.baddbmm_(pair_n, now)  # [r, 2 C, K] [r, K, V]: k S − v above q S
        # −E times k S − v is e = E (v − k S): the two signs save a negation.
        torch.bmm(minus_E_n, error_n, out=e_n)  # [r, C, C] [r, C, V]
        # The part of the start that is left at the chunk's end, [r, 1, 1], then what is written.
        if whole is not None:
            now.mul_(whole)
        now.baddbmm_(wt_n, e_n)  # [r, K, C] [r, C, V]
    return torch.baddbmm(reads[:, C:], P, e, beta=scale, alpha=scale)  # [R, C, V]


def _decayed(pair: Tensor, w: Tensor, decay: Decay | None) -> tuple[Tensor, Tensor]:
    """What reads the memory at the chunk's start, and what writes to the one at its end."""
    if decay is None:
        return pair, w
    return pair * _twice(decay.start).unsqueeze(-1), w * decay.end.unsqueeze(-1)


def _twice(x: Tensor) -> Tensor:
    """[R, C, ...] for both halves of a pair, [R, 2 C, ...]."""
    return torch.cat((x, x), 1)


def _whole(decay: Decay | None, sizes: list[int]) -> Sequence[Tensor | None]:
    """What a chunk leaves of the memory at its start, for each step, [r, 1, 1]."""
    return [None] * len(sizes) if decay is None else decay.whole.split(sizes)


def backward(
    pair: Tensor,
    w: Tensor,
    y: Tensor,
    dS: Tensor,
    kept: Kept,
    sizes: list[int],
    decay: Decay | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dk above dq, dv, dw, dlog α or None) of a group; dS [N·H, K, V] moves to its start.

    y: [R, 2 C, V], do times scale in its lower half; its upper half becomes −z.
    """
    # As in the forward: what needs no dS, for all chunks at once.
    C, (e, minus_E, S, *_) = w.shape[1], kept
    minus_z, dw, dpair = torch.empty_like(e), torch.empty_like(w), torch.empty_like(pair)
    P = torch.bmm(pair[:, C:], w.mT).tril_()  # [R, C, C]
    if decay is not None:
        P.mul_(decay.between)
    # By way of o alone; the loop adds what the later memory contributes.
    de = torch.bmm(P.mT, y[:, C:])  # [R, C, V]
    at_start, at_end = _decayed(pair, w, decay)  # [R, 2 C, K], [R, C, K]
    dwhole = None if decay is None else torch.empty_like(decay.whole)  # [R, 1, 1]
    pieces = (at_start.mT, y, y[:, :C], at_end, de, minus_E.mT, minus_z, e, dw, S, dpair)
    wholes = zip(
        _whole(decay, sizes), [None] * len(sizes) if dwhole is None else dwhole.split(sizes)
    )
    # Chunks in reverse, since dS comes from the end.
    steps = list(zip(first_rows(dS, sizes), wholes, *(x.split(sizes) for x in pieces)))
    for now, (whole, dwhole_n), pair_n, y_n, upper_n, w_n, de_n, Et_n, minus_z_n, e_n, dw_n, S_n, \
            dpair_n in reversed(steps):  # fmt: skip
        # dw = e dSᵀ, before dS moves on to the chunk's start.
        torch.bmm(e_n, now.mT, out=dw_n)  # [r, C, V] [r, V, K]
        # −z = (−E)ᵀ (Pᵀ do + w dS)
        torch.bmm(Et_n, de_n.baddbmm_(w_n, now), out=minus_z_n)  # [r, C, C] [r, C, V]
        upper_n.copy_(minus_z_n)  # [r, C, V]: y is now −z above scale · do
        # −z Sᵀ above do Sᵀ: the parts of dk and dq that the start gives.
        torch.bmm(y_n, S_n.mT, out=dpair_n)  # [r, 2 C, V] [r, V, K]
        if whole is not None and dwhole_n is not None:
            # The whole chunk's retention times its gradient ⟨S, dS⟩, [r, 1, 1], for log α.
            torch.mul(whole, (S_n * now).sum((1, 2), keepdim=True), out=dwhole_n)
            now.mul_(whole)
        now.baddbmm_(pair_n, y_n)  # [r, K, 2 C] [r, 2 C, V]
    # Below: what is left needs no memory, and is done for all chunks at once again.
    ones = w.new_ones(C, C)
    # [R, 2 C, V] [R, V, C]
    products = torch.bmm(y, e.mT).mul_(torch.cat((ones.tril(-1), ones.tril())))  # dA above dP
    dlog_alpha = None
    if decay is not None and dwhole is not None:
        products.mul_(_twice(decay.between))  # [R, 2 C, C]
        dpair.mul_(_twice(decay.start).unsqueeze(-1))  # [R, 2 C, K]
        dw.mul_(decay.end.unsqueeze(-1))  # [R, C, K]
        # Each part of the decay times its gradient: [R, C, C], then rows of [R, C].
        between = torch.bmm(pair, w.mT).mul_(products).unflatten(1, (2, C)).sum(1)
        start = torch.linalg.vecdot(pair, dpair).unflatten(1, (2, C)).sum(1)
        dlog_alpha = dlog_retention(between, start, torch.linalg.vecdot(w, dw), dwhole)
    # What tokens of one chunk do to each other: dA w above dP w, and dAᵀ k + dPᵀ q.
    dpair.baddbmm_(products, w)  # [R, 2 C, C] [R, C, K]
    dw.baddbmm_(products.mT, pair)  # [R, C, 2 C] [R, 2 C, K]
    return dpair, minus_z.neg_(), dw, dlog_alpha
