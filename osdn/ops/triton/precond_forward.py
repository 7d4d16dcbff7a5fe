"""Phase 1 without a box: the preconditioner's path, in chunks.

With s_t = k_t ⊙ k_t, Γ_t = exp(pre_t) the retention from the chunk's start up to before token t,
post_t = pre_t + log γ_t, W_tj = exp(pre_t − post_j) η b_j for j < t, and L = diag(b) (W ⊙ s sᵀ):

    (I + L) x = 1 − b ⊙ Γ ⊙ (s d_start)
    d_next    = exp(post_C) d_start + Σ_j exp(post_C − post_j) η b_j x_j s_j

`inverse_kernel` makes (I + L)⁻¹, one program a chunk and head; `scan_kernel` walks the chunks of a
sequence and head in order, two matrix-vector products and one weighted sum each. What leaves is x
of every token and d at every chunk's start; d within a chunk follows from those in parallel.
All in float32; the inverse and its Gram matrix in three tf32 products each, never in one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from osdn.ops.operands import Options
from osdn.ops.triton.chunks import CHUNK, Chunks, load_tile, locate_chunk, locate_sequence, tile
from osdn.ops.triton.config import launch
from osdn.ops.triton.gates import (
    across,
    decay,
    decay_from_start,
    down,
    load_gate,
    load_retention,
)
from osdn.ops.triton.precond_segments import join, transfers
from osdn.ops.triton.solve import SCRATCH, invert, mul_exactly, split, store_blocks


@triton.jit
def _load_squares(p, o_t, left, o_k, K: tl.constexpr, H: tl.constexpr):
    """k ⊙ k of 32 tokens [32, BK] in float32, of bfloat16 keys as `split` leaves it."""
    k = load_tile(p, o_t, left, H * K, o_k, K)  # [32, BK]
    s = k.to(tl.float32) * k.to(tl.float32)  # [32, BK]
    if k.dtype == tl.bfloat16:
        return split(s)
    else:
        return s


@triton.jit
def _couple(G, b_i, pre_i, b_j, post_j):
    """A block of L from s sᵀ; b_j holds η b_j."""
    return (b_i[:, None] * b_j[None, :]) * decay(down(pre_i), across(post_j)) * G  # [32, 32]


@triton.jit(do_not_specialize=["T"])
def inverse_kernel(
    k, beta, log_gamma, inverse, kept, scratch, cu_seqlens, indices, eta, T,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    HAS_GAMMA: tl.constexpr, BETA_AWARE: tl.constexpr, IS_VARLEN: tl.constexpr,
    ROUND: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """(I + L)⁻¹ [B, T, H, BT] float32, and if ROUND in kept's dtype too. Grid: chunks · H."""
    i_h = tl.program_id(0) % H
    i_c = tl.program_id(0) // H
    begin, left = locate_chunk(i_c, cu_seqlens, indices, T, BT, IS_VARLEN)
    if left <= 0:
        return
    o_0 = tl.arange(0, 32)
    o_1 = o_0 + 32
    row = begin * H + i_h
    k += row * K
    beta += row
    log_gamma += row

    # s sᵀ, its three blocks on and below the diagonal.
    G00 = tl.zeros([32, 32], tl.float32)
    G10, G11 = G00, G00
    for i_k in range(tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        s0 = _load_squares(k, o_0, left, o_k, K, H)
        s1 = _load_squares(k, o_1, left, o_k, K, H)
        G00 = mul_exactly(s0, s0, G00)  # [32, BK] [BK, 32], as the next two
        G10 = mul_exactly(s1, s0, G10)
        G11 = mul_exactly(s1, s1, G11)

    # Sums of log γ and gates of both halves, [32] each.
    pre0, post0, end = load_retention(log_gamma, o_0, left, (0.0, 0.0), H, HAS_GAMMA)
    pre1, post1, end = load_retention(log_gamma, o_1, left, end, H, HAS_GAMMA)
    if BETA_AWARE:
        b0 = load_gate(beta, o_0, left, H)
        b1 = load_gate(beta, o_1, left, H)
    else:
        b0 = tl.full([32], 1.0, tl.float32)
        b1 = b0

    # (I + L)⁻¹; L is made of s sᵀ as it goes in.
    X = invert(
        _couple(G00, b0, pre0, b0 * eta, post0),
        _couple(G10, b1, pre1, b0 * eta, post0),
        _couple(G11, b1, pre1, b1 * eta, post1),
        scratch + tl.program_id(0).to(tl.int64) * SCRATCH,
        PREC,
    )
    store_blocks(inverse + row * BT, H * BT, left, X)
    if ROUND:
        store_blocks(kept + row * BT, H * BT, left, X)


@triton.jit(do_not_specialize=["T", "segment"])
def scan_kernel(
    k, beta, log_gamma, inverse, initial, x, starts, final, cu_seqlens, offsets, eta, T, segment,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    HAS_GAMMA: tl.constexpr, BETA_AWARE: tl.constexpr, IS_VARLEN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """x [B, T, H], starts [chunks, H, K] and final [N, H, K], all float32. Grid: N · H.

    N counts segments where there are any. The loads of STAGES − 1 chunks run ahead of the
    arithmetic, through shared memory.
    """
    i_h = tl.program_id(0) % H
    i_n = tl.program_id(0) // H
    begin, length, first = locate_sequence(i_n, cu_seqlens, offsets, T, segment, BT, IS_VARLEN)
    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    row = begin * H + i_h
    k += row * K
    inverse += row * BT
    beta += row
    log_gamma += row
    x += row
    starts += (first * H + i_h) * K
    state = (i_n.to(tl.int64) * H + i_h) * K

    b_d = tl.load(initial + state + o_k, mask=m_k, other=0.0)  # [BK]
    for i_t in tl.range(0, tl.cdiv(length, BT), num_stages=STAGES):
        left = length - i_t * BT
        b_k = load_tile(k, o_t, left, H * K, o_k, K)  # [BT, BK]
        b_X = load_tile(inverse, o_t, left, H * BT, o_t, BT)  # [BT, BT]
        tl.store(starts + o_k, b_d, mask=m_k)
        pre, post, end = load_retention(log_gamma, o_t, left, (0.0, 0.0), H, HAS_GAMMA)
        b_s = b_k.to(tl.float32)
        b_s = b_s * b_s
        b_r = tl.sum(b_s * b_d[None, :], 1)  # s d_start: [BT, BK] over K
        if HAS_GAMMA:
            b_r *= decay_from_start(pre)
        if BETA_AWARE:
            b_b = load_gate(beta, o_t, left, H)  # [BT]
            b_r *= b_b
        b_x = tl.sum(b_X * (1.0 - b_r)[None, :], 1)  # [BT, BT] over its columns
        tl.store(x + o_t * H, b_x, mask=o_t < left)
        # What the chunk's tokens add to d at its end.
        b_y = eta * b_x
        if BETA_AWARE:
            b_y *= b_b
        if HAS_GAMMA:
            b_y *= decay(end, post)
            b_d *= decay_from_start(end)
        b_d += tl.sum(b_s * b_y[:, None], 0)  # [BT, BK] over the tokens

        k += BT * H * K
        inverse += BT * H * BT
        beta += BT * H
        log_gamma += BT * H
        x += BT * H
        starts += H * K
    tl.store(final + state + o_k, b_d, mask=m_k)


def chunk_inverse(
    k: Tensor, beta: Tensor, log_gamma: Tensor | None, chunks: Chunks, rule: Options
) -> tuple[Tensor, Tensor]:
    """(I + L)⁻¹ of phase 1 [B, T, H, CHUNK] in float32, and as `inverse_like` has it."""
    T, H, K = k.shape[1:]
    kept = inverse_like(k)
    inverse = kept if kept.dtype == torch.float32 else torch.empty_like(kept, dtype=torch.float32)
    scratch = inverse.new_empty(chunks.bound * H * SCRATCH.value)
    inverse_kernel[(chunks.bound * H,)](
        k, beta, beta if log_gamma is None else log_gamma, inverse, kept, scratch,
        chunks.cu_seqlens, chunks.indices, rule.eta, T,
        H=H, K=K, BT=CHUNK, HAS_GAMMA=log_gamma is not None,
        BETA_AWARE=rule.beta_aware, IS_VARLEN=chunks.indices is not None,
        ROUND=kept is not inverse, PREC="tf32x3", **launch("inverse", k, K),
    )  # fmt: skip
    return inverse, kept


def inverse_like(k: Tensor) -> Tensor:
    """Empty (I + L)⁻¹ [B, T, H, CHUNK], as it is kept for the backward: beside bfloat16 keys in
    bfloat16, which the gradient of d does not notice; else in float32, as float16 could overflow.
    """
    dtype = torch.bfloat16 if k.dtype == torch.bfloat16 else torch.float32
    return k.new_empty(*k.shape[:3], CHUNK, dtype=dtype)


def chunk_scan(
    k: Tensor,
    beta: Tensor,
    log_gamma: Tensor | None,
    initial_precond: Tensor,
    x: Tensor,
    starts: Tensor,
    chunks: Chunks,
    rule: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill x [B, T, H] and starts [chunks, H, K].

    Returns d after the last token [N, H, K]; the inverse of every chunk, as `inverse_like` has it;
    M of every segment.
    """
    T, H, K = k.shape[1:]

    def walk(initial: Tensor, chunks: Chunks) -> Tensor:
        final = torch.empty_like(initial)
        scan_kernel[(chunks.sequences * H,)](
            k, beta, beta if log_gamma is None else log_gamma, inverse, initial,
            x, starts, final, chunks.cu_seqlens, chunks.offsets, rule.eta, T, chunks.segment,
            H=H, K=K, BT=CHUNK, BK=tile(K), HAS_GAMMA=log_gamma is not None,
            BETA_AWARE=rule.beta_aware, IS_VARLEN=chunks.offsets is not None,
            **launch("scan", k, K),
        )  # fmt: skip
        return final

    inverse, kept = chunk_inverse(k, beta, log_gamma, chunks, rule)
    M = transfers(k, beta, log_gamma, inverse, None, chunks, rule)
    return join(walk, M, initial_precond, chunks, reverse=False), kept, M
