"""Products of retentions over the stretches of a chunk, of both stages of the chunkwise backend.

Never quotients of products, nor differences of their logarithms: with a hard reset (a retention of
0) these are 0 over 0, and −∞ less −∞.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def stretches(retention: Tensor, out: Tensor) -> Tensor:
    """P[r, c] = Π_{r≤i<c} retention_i for r ≤ c, else 0; [R, C] to [R, C+1, C+1], in `out`."""
    C = retention.shape[1]
    outside = retention.new_ones(C + 1, C + 1).tril_(-1)[:, :-1]  # [C+1, C]: tokens i < r
    factors = torch.addcmul(outside, 1 - outside, retention[:, None])  # [R, C+1, C]
    # Along a row the tokens before r count as 1, so that the product begins at r.
    torch.cumprod(factors, -1, out=out[:, :, 1:])
    out[:, :, 0] = 1  # the empty stretch; triu_ leaves it only where r = c = 0
    return out.triu_()


class Decay(NamedTuple):
    """How the memory decays within the chunks of a group; all from α [R, C].

    between: [R, C, C], Π_{j<m≤i} α_m at (i, j) for j ≤ i, else 0: of what j wrote, the part that
    is left at token i.  start: [R, C], Π_{m≤i} α_m, of the memory at the chunk's start.
    end: [R, C], Π_{m>j} α_m, of what j wrote, at the chunk's end.  whole: [R, 1, 1], Π α_m.
    """

    between: Tensor
    start: Tensor
    end: Tensor
    whole: Tensor

    @staticmethod
    def of(alpha: Tensor) -> Decay:
        R, C = alpha.shape
        P = stretches(alpha, alpha.new_empty(R, C + 1, C + 1))  # [R, C+1, C+1]
        # A write of j has its own α behind it (decay comes first), hence the shift by one.
        return Decay(P[:, 1:, 1:].mT, P[:, 0, 1:], P[:, 1:, -1], P[:, :1, -1:])


def dlog_retention(between: Tensor, start: Tensor, end: Tensor, whole: Tensor) -> Tensor:
    """dL/dlog α [R, C], from each part of Decay times, element by element, its gradient.

    A stretch holds α_t as a factor where it begins at or before t and ends after it. Every term of
    the sum for t holds α_t, so a reset's gradient is exactly 0, and nothing large cancels.
    """
    R, C = start.shape
    M = between.new_zeros(R, C + 1, C + 1)  # by the stretch's first token r and its end c
    M[:, 1:, 1:] = between.mT
    M[:, 0, 1:] = start
    M[:, 1:, -1] += end
    M[:, :1, -1:] += whole
    return M.cumsum_(1).triu_(1).sum(-1)[:, :C]  # Σ_{r≤t} Σ_{c>t}
