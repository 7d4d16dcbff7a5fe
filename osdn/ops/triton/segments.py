"""Joining the segments of a walk whose state goes through a segment by a known affine map.

Forwards S → M S + U, with M [K, K] and U [K, V] a segment's own; backwards dS → Mᵀ dS + U from the
last segment. One program holds a block of columns and takes a sequence's segments in order; a state
is read back from where it was just written, in blocks of rows, since M takes the registers. Three
tf32 products each, S and dS being float32 from chunk to chunk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from osdn.ops.triton.chunks import ceil_div, load_tile, store_tile, tile


@triton.jit(do_not_specialize=["NS"])
def link_kernel(
    M, U, initial, starts, final, NS,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BJ: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """starts [N · NS, H, K, V], final [N, H, K, V], all float32. Grid: N · H · blocks of V."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_h = tl.program_id(0) // NV % H
    i_n = tl.program_id(0) // (NV * H)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    state = (i_n.to(tl.int64) * H + i_h) * (K * V)
    b_S = load_tile(initial + state, o_k, K, V, o_v, V)  # [BK, BV]
    for i in range(NS):
        i_s = i
        if REVERSE:
            i_s = NS - 1 - i
        at = (i_n.to(tl.int64) * NS + i_s) * H + i_h
        store_tile(starts + at * (K * V), b_S, o_k, K, V, o_v, V)
        tl.debug_barrier()  # other threads read it below
        b_S = load_tile(U + at * (K * V), o_k, K, V, o_v, V)  # [BK, BV]
        for i_j in range(tl.cdiv(K, BJ)):
            o_j = i_j * BJ + tl.arange(0, BJ)
            b_j = load_tile(starts + at * (K * V), o_j, K, V, o_v, V)  # [BJ, BV]
            if REVERSE:
                m = (o_k[:, None] < K) & (o_j[None, :] < K)
                p = M + at * (K * K) + o_j[None, :] * K + o_k[:, None]
                b_M = tl.load(p, mask=m, other=0.0)  # Mᵀ [BK, BJ]
            else:
                b_M = load_tile(M + at * (K * K), o_k, K, K, o_j, K)  # [BK, BJ]
            b_S += tl.dot(b_M, b_j, input_precision="tf32x3")  # [BK, BJ] [BJ, BV]
    store_tile(final + state, b_S, o_k, K, V, o_v, V)


def link(M: Tensor, U: Tensor, initial: Tensor, *, reverse: bool) -> tuple[Tensor, Tensor]:
    """(state at every segment's start, state at the end), [segments, H, K, V] and [N, H, K, V].

    M [segments, H, K, K], U [segments, H, K, V], initial [N, H, K, V], float32. With reverse, from
    the last segment to the first by Mᵀ, and a start is where that walk enters the segment.
    """
    N, H, K, V = initial.shape
    BV = min(64, tile(V))
    starts, final = torch.empty_like(U), torch.empty_like(initial)
    link_kernel[(N * H * ceil_div(V, BV),)](
        M, U, initial, starts, final, M.shape[0] // N,
        H=H, K=K, V=V, BK=tile(K), BJ=64, BV=BV, REVERSE=reverse, num_warps=8, num_stages=1,
    )  # fmt: skip
    return starts, final
