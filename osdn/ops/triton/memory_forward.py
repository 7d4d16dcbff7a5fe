"""Phase 2: residuals, reads and the memory, walking the chunks of a sequence in order.

With S the memory at a chunk's start, and w, A and A k from `write_keys`:

    e = A v − (A k) S,   o = scale · (q S + tril(q wᵀ) e),   S ← S + wᵀ e.

One program holds a block of BV columns of S in float32 registers; columns do not interact. Operands
of the dots are in the input's dtype, sums in float32. Only S e and wᵀ e wait for the chunk before.

Where few heads and sequences would leave the GPU idle, the walk is cut into segments
(`chunks.split`): a first pass makes each segment's map S → M S + U, from the identity without v and
from zero with it; `segments.link` joins them; a second walks from the exact starts in parallel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from osdn.ops.operands import Options
from osdn.ops.triton.chunks import (
    CHUNK,
    Chunks,
    count_segments,
    load_tile,
    locate_sequence,
    split,
    store_tile,
    tile,
)
from osdn.ops.triton.config import launch, precision
from osdn.ops.triton.segments import link


@triton.jit(do_not_specialize=["T", "segment"])
def memory_kernel(
    q, w, ka, v, A, initial, o, e, final, cu_seqlens, offsets, scale, T, segment,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    IS_VARLEN: tl.constexpr, VALUES: tl.constexpr, READ: tl.constexpr, SAVE: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """o [B, T, H, V] if READ, e likewise if SAVE, final [N, H, K, V]. Grid: N · H · blocks of V.

    N counts segments where there are any. VALUES: v is there, else it is zero. Without READ the
    walk begins from zero, or where there are no values from the identity.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_h = tl.program_id(0) // NV % H
    i_n = tl.program_id(0) // (NV * H)
    begin, length, _ = locate_sequence(i_n, cu_seqlens, offsets, T, segment, BT, IS_VARLEN)
    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    causal = o_t[:, None] >= o_t[None, :]
    row = begin * H + i_h
    q += row * K
    w += row * K
    ka += row * K
    A += row * BT
    v += row * V
    o += row * V
    e += row * V
    state = (i_n.to(tl.int64) * H + i_h) * K * V
    type = q.dtype.element_ty

    if READ:
        b_S = load_tile(initial + state, o_k, K, V, o_v, V)
    elif VALUES:
        b_S = tl.zeros([BK, BV], tl.float32)
    else:
        b_S = tl.where(o_k[:, None] == o_v[None, :], 1.0, 0.0)
    for i_t in range(tl.cdiv(length, BT)):
        left = length - i_t * BT
        if READ:
            b_q = load_tile(q, o_t, left, H * K, o_k, K)
        b_w = load_tile(w, o_t, left, H * K, o_k, K)
        b_ka = load_tile(ka, o_t, left, H * K, o_k, K)
        if VALUES:
            b_v = load_tile(v, o_t, left, H * V, o_v, V)
            b_A = load_tile(A, o_t, left, H * BT, o_t, BT)

        S = b_S.to(type)
        if VALUES:
            b_e = tl.dot(b_A, b_v, input_precision=PREC)
            b_e -= tl.dot(b_ka, S, input_precision=PREC)
        else:
            b_e = -tl.dot(b_ka, S, input_precision=PREC)
        b_e = b_e.to(type)
        if READ:
            b_P = tl.dot(b_q, tl.trans(b_w), input_precision=PREC)
            b_P = tl.where(causal, b_P, 0.0).to(type)
            b_o = tl.dot(b_q, S, input_precision=PREC)
            b_o += tl.dot(b_P, b_e, input_precision=PREC)
        b_S += tl.dot(tl.trans(b_w), b_e, input_precision=PREC)
        if READ:
            store_tile(o, b_o * scale, o_t, left, H * V, o_v, V)
        if SAVE:
            store_tile(e, b_e, o_t, left, H * V, o_v, V)

        q += BT * H * K
        w += BT * H * K
        ka += BT * H * K
        A += BT * H * BT
        v += BT * H * V
        o += BT * H * V
        e += BT * H * V
    store_tile(final + state, b_S, o_k, K, V, o_v, V)


def memory(
    q: Tensor,
    w: Tensor,
    ka: Tensor,
    v: Tensor,
    A: Tensor,
    initial_state: Tensor,
    e: Tensor | None,
    chunks: Chunks,
    rule: Options,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(o, final_state, segments); the residuals go into e [B, T, H, V] where it is given.

    segments: M and the memory at the start of every segment, or nothing where there are none.
    """
    o, kept = torch.empty_like(v), segments_like(q, v, chunks.cu_seqlens)
    if not kept:
        final = torch.empty_like(initial_state)
        _walk(q, w, ka, v, A, initial_state, o, e, final, chunks, rule)
        return o, final, []
    M, U = kept
    segments = split(chunks, len(M) // chunks.sequences)
    _walk(None, w, ka, None, A, M, None, None, M, segments, rule)
    _walk(None, w, ka, v, A, U, None, None, U, segments, rule)
    starts, final = link(M, U, initial_state, reverse=False)
    _walk(q, w, ka, v, A, starts, o, e, U, segments, rule)
    return o, final, [M, starts]


def segments_like(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    """Empty M [segments, H, K, K] and a memory at each segment's start, or nothing without any."""
    (B, T, H, K), V = q.shape, v.shape[-1]
    programs = H * triton.cdiv(V, launch("memory", q, K, V)["BV"])
    count = 1 if cu_seqlens is not None else count_segments(B, T, programs)
    if count == 1:
        return []
    return [q.new_empty(B * count, H, K, x, dtype=torch.float32) for x in (K, V)]


def _walk(
    q: Tensor | None,
    w: Tensor,
    ka: Tensor,
    v: Tensor | None,
    A: Tensor,
    initial: Tensor,
    o: Tensor | None,
    e: Tensor | None,
    final: Tensor,
    chunks: Chunks,
    rule: Options,
) -> None:
    """Launch the kernel; without v the values are zero, without o nothing is read, initial too."""
    (T, H, K), V = w.shape[1:], final.shape[-1]
    config = launch("memory", w, K, V)
    memory_kernel[(chunks.sequences * H * triton.cdiv(V, config["BV"]),)](
        w if q is None else q, w, ka, w if v is None else v, A, initial,
        w if o is None else o, w if e is None else e, final,
        chunks.cu_seqlens, chunks.offsets, rule.scale, T, chunks.segment,
        H=H, K=K, V=V, BT=CHUNK, BK=tile(K), IS_VARLEN=chunks.offsets is not None,
        VALUES=v is not None, READ=o is not None, SAVE=e is not None, PREC=precision(w), **config,
    )  # fmt: skip
