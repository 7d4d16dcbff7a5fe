"""Phase 2: residuals, reads and the memory, walking the chunks of a sequence in order.

With S the memory at a chunk's start, and w, A and A k from `write_keys`:

    e = A v − (A k) S,   o = scale · (q S + tril(q wᵀ) e),   S ← S + wᵀ e.

One program holds a block of BV columns of S in float32 registers; columns do not interact. Operands
of the dots are in the input's dtype, sums in float32. Only S e and wᵀ e wait for the chunk before.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from osdn.ops.rule import Rule
from osdn.ops.triton.chunks import (
    CHUNK,
    Chunks,
    load_tile,
    locate_sequence,
    store_tile,
    tile,
)
from osdn.ops.triton.config import launch, precision


@triton.jit(do_not_specialize=["T"])
def memory_kernel(
    q, w, ka, v, A, initial, o, e, final, cu_seqlens, offsets, scale, T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    IS_VARLEN: tl.constexpr, SAVE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """o [B, T, H, V], e likewise if SAVE, final [N, H, K, V]. Grid: N · H · blocks of V."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_h = tl.program_id(0) // NV % H
    i_n = tl.program_id(0) // (NV * H)
    begin, length, _ = locate_sequence(i_n, cu_seqlens, offsets, T, BT, IS_VARLEN)
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

    b_S = load_tile(initial + state, o_k, K, V, o_v, V)
    for i_t in range(tl.cdiv(length, BT)):
        left = length - i_t * BT
        b_q = load_tile(q, o_t, left, H * K, o_k, K)
        b_w = load_tile(w, o_t, left, H * K, o_k, K)
        b_ka = load_tile(ka, o_t, left, H * K, o_k, K)
        b_v = load_tile(v, o_t, left, H * V, o_v, V)
        b_A = load_tile(A, o_t, left, H * BT, o_t, BT)

        S = b_S.to(type)
        b_e = tl.dot(b_A, b_v, input_precision=PREC)
        b_e -= tl.dot(b_ka, S, input_precision=PREC)
        b_e = b_e.to(type)
        b_P = tl.dot(b_q, tl.trans(b_w), input_precision=PREC)
        b_P = tl.where(causal, b_P, 0.0).to(type)
        b_o = tl.dot(b_q, S, input_precision=PREC)
        b_o += tl.dot(b_P, b_e, input_precision=PREC)
        b_S += tl.dot(tl.trans(b_w), b_e, input_precision=PREC)
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
    rule: Rule,
) -> tuple[Tensor, Tensor]:
    """(o, final_state); the residuals go into e [B, T, H, V] where it is given."""
    (T, H, K), V = q.shape[1:], v.shape[-1]
    config = launch("memory", q, K, V)
    o, final = torch.empty_like(v), torch.empty_like(initial_state)
    memory_kernel[(chunks.sequences * H * triton.cdiv(V, config["BV"]),)](
        q, w, ka, v, A, initial_state, o, o if e is None else e, final,
        chunks.cu_seqlens, chunks.offsets, rule.scale, T,
        H=H, K=K, V=V, BT=CHUNK, BK=tile(K),
        IS_VARLEN=chunks.offsets is not None, SAVE=e is not None, PREC=precision(q), **config,
    )  # fmt: skip
    return o, final
