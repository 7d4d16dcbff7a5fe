"""Phase 2 of the chunkwise backend: the memory over a group of chunks, and its gradient.

Per chunk of C tokens with start state S and write keys w_t = β_t d_t ⊙ k_t:

    E  = (I + tril(k wᵀ, −1))⁻¹          e = E (v − k S)            residuals, [C, V]
    o  = scale · (q S + tril(q wᵀ) e)    S ← S + wᵀ e

Backward with P = tril(q wᵀ), do already times scale and dS the gradient of the chunk's final S:

    z  = Eᵀ (Pᵀ do + w dS)    dP = tril(do eᵀ)    dA = −tril(z eᵀ, −1)
    dq = do Sᵀ + dP w    dk = −z Sᵀ + dA w    dv = z    dw = e dSᵀ + dPᵀ q + dAᵀ k
    dS ← dS + qᵀ do − kᵀ z

Rows are [R, C, ·] as in `layout`. k and q lie one above the other, [R, 2 C, K], since S
multiplies both, and w both of their gradients: one product in place of two. What needs S or dS is
done step by step, while these are in the cache. E is kept, and S at every chunk's start; to find
them again would cost a quarter of the backward.

Source: arXiv 2406.06484 for the delta rule in chunks (there with v′ = β e and w = k).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from osdn.ops.chunkwise.layout import first_rows


class Kept(NamedTuple):
    """What the backward wants of all chunks, or of a group's, in the order of the rows.

    e: [R, C, V].  minus_E: −E, [R, C, C].  S: at the chunk's start, [R, K, V].
    """

    e: Tensor
    minus_E: Tensor
    S: Tensor


def forward(
    pair: Tensor, minus_v: Tensor, w: Tensor, S: Tensor, kept: Kept, scale: float, sizes: list[int]
) -> Tensor:
    """o [R, C, V] of a group; e, −E and S go into `kept`, and S [N·H, K, V] to the group's end.

    pair: k above q, [R, 2 C, K].  minus_v: −v above zeros, [R, 2 C, V]; overwritten.
    """
    C, (e, minus_E, *_) = w.shape[1], kept
    minus_one = torch.eye(C, dtype=w.dtype, device=w.device).neg_().expand_as(minus_E)
    A = torch.bmm(w, pair[:, :C].mT).mT
    # Into an `out` that lies row by row: a third of the time, since nothing is transposed.
    torch.linalg.solve_triangular(A, minus_one, upper=False, unitriangular=True, out=minus_E)
    reads = minus_v
    pieces = (pair, reads, reads[:, :C], minus_E, e, w.mT, kept.S)
    steps = zip(first_rows(S, sizes), *(x.split(sizes) for x in pieces))
    for now, pair_n, reads_n, error_n, minus_E_n, e_n, wt_n, start_n in steps:
        start_n.copy_(now)
        reads_n.baddbmm_(pair_n, now)
        torch.bmm(minus_E_n, error_n, out=e_n)
        now.baddbmm_(wt_n, e_n)
    P = torch.bmm(pair[:, C:], w.mT).tril_()
    return torch.baddbmm(reads[:, C:], P, e, beta=scale, alpha=scale)


def backward(
    pair: Tensor, w: Tensor, y: Tensor, dS: Tensor, kept: Kept, sizes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """(dk above dq, dv, dw) of a group; dS [N·H, K, V] moves to its start.

    y: [R, 2 C, V], do times scale in its lower half; its upper half becomes −z.
    """
    C, (e, minus_E, S, *_) = w.shape[1], kept
    minus_z, dw, dpair = torch.empty_like(e), torch.empty_like(w), torch.empty_like(pair)
    P = torch.bmm(pair[:, C:], w.mT).tril_()
    de = torch.bmm(P.mT, y[:, C:])
    pieces = (pair.mT, y, y[:, :C], w, de, minus_E.mT, minus_z, e, dw, S.mT, dpair)
    steps = list(zip(first_rows(dS, sizes), *(x.split(sizes) for x in pieces)))
    for now, pair_n, y_n, upper_n, w_n, de_n, Et_n, minus_z_n, e_n, dw_n, St_n, dpair_n in reversed(
        steps
    ):
        torch.bmm(e_n, now.mT, out=dw_n)
        torch.bmm(Et_n, de_n.baddbmm_(w_n, now), out=minus_z_n)
        upper_n.copy_(minus_z_n)
        torch.bmm(y_n, St_n, out=dpair_n)
        now.baddbmm_(pair_n, y_n)
    ones = w.new_ones(C, C)
    products = torch.bmm(y, e.mT).mul_(torch.cat((ones.tril(-1), ones.tril())))  # dA above dP
    return dpair.baddbmm_(products, w), minus_z.neg_(), dw.baddbmm_(products.mT, pair)
