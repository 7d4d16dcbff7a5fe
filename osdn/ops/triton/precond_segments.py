"""Phase 1's walk over few and long sequences, in segments that are walked in parallel.

Through a segment d goes by an affine map d → M d + u, and backwards λ → Mᵀ λ + c. M [K, K] is made
chunk by chunk, as `precond_forward` makes d, from the identity:

    M ← exp(post_C) M − Σ_j exp(post_C − post_j) η b_j s_j y_jᵀ,   y = (I + L)⁻¹ (b ⊙ Γ ⊙ s M),

with 16-bit operands beside 16-bit keys, since its error ε does not matter: a walk from guesses g_i
gives each segment's exact end e_i, and with δ the difference between a start and its guess

    start_{i+1} = e_i + M_i δ_i

is off by ε δ. The first guess is the sequence's own start; the third round leaves ε³. Four walks on
hundreds of programs and M take less time than one walk on a few, if that is long enough.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from osdn.ops.operands import Options
from osdn.ops.triton.chunks import (
    CHUNK,
    Chunks,
    ceil_div,
    count_segments,
    load_tile,
    locate_sequence,
    split,
    store_tile,
    tile,
)
from osdn.ops.triton.config import launch, precision
from osdn.ops.triton.gates import decay, decay_from_start, load_gate, load_retention

Walk = Callable[[Tensor, Chunks], Tensor]
ROUNDS = 3


@triton.jit(do_not_specialize=["T", "segment"])
def transfer_kernel(
    k, beta, log_gamma, inverse, M, clipped, eta, T, segment,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_GAMMA: tl.constexpr, BETA_AWARE: tl.constexpr, BOXED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """M [segments, H, K, K] float32. Grid: segments · H · blocks of BV columns.

    BOXED: only chunks before number clipped[n, h] count, those that a token scan has not walked.
    """
    NV: tl.constexpr = (K + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_h = tl.program_id(0) // NV % H
    i_n = tl.program_id(0) // (NV * H)
    begin, length, first = locate_sequence(i_n, beta, beta, T, segment, BT, False)
    NT = tl.cdiv(length, BT)
    if BOXED:
        i_b = i_n // tl.cdiv(tl.cdiv(T, BT), segment)
        NT = tl.minimum(NT, tl.load(clipped + i_b * H + i_h) - first.to(tl.int32))
    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    row = begin * H + i_h
    k += row * K
    inverse += row * BT
    beta += row
    log_gamma += row
    type = k.dtype.element_ty
    b_M = tl.where(o_k[:, None] == o_v[None, :], 1.0, 0.0)  # [BK, BV]
    for i_t in range(NT):
        left = length - i_t * BT
        b_s = load_tile(k, o_t, left, H * K, o_k, K).to(tl.float32)  # [BT, BK]
        b_s *= b_s
        b_X = load_tile(inverse, o_t, left, H * BT, o_t, BT)  # [BT, BT]
        pre, post, end = load_retention(log_gamma, o_t, left, (0.0, 0.0), H, HAS_GAMMA)
        b_y = tl.dot(b_s.to(type), b_M.to(type), input_precision=PREC)  # [BT, BV]
        if HAS_GAMMA:
            b_y *= decay_from_start(pre)[:, None]
        if BETA_AWARE:
            b_b = load_gate(beta, o_t, left, H)  # [BT]
            b_y *= b_b[:, None]
            b_s *= b_b[:, None]
        b_y = tl.dot(b_X.to(type), b_y.to(type), input_precision=PREC)  # [BT, BV]
        if HAS_GAMMA:
            b_s *= decay(end, post)[:, None]
            b_M *= decay_from_start(end)
        # [BK, BT] [BT, BV]
        b_M -= tl.dot(tl.trans((eta * b_s).to(type)), b_y.to(type), input_precision=PREC)

        k += BT * H * K
        inverse += BT * H * BT
        beta += BT * H
        log_gamma += BT * H
    M += (i_n.to(tl.int64) * H + i_h) * K * K
    store_tile(M, b_M, o_k, K, K, o_v, K)


@triton.jit(do_not_specialize=["NS"])
def correct_kernel(
    M, guesses, ends, initial, starts, NS,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """starts [N · NS, H, K] from guesses and the ends they led to, alike; initial [N, H, K]; all
    float32. REVERSE: from the last segment, by Mᵀ. Grid: N · H.
    """
    i_h = tl.program_id(0) % H
    i_n = tl.program_id(0) // H
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    b_d = tl.load(initial + (i_n.to(tl.int64) * H + i_h) * K + o_k, mask=m_k, other=0.0)
    for i in range(NS):
        i_s = i
        if REVERSE:
            i_s = NS - 1 - i
        at = (i_n.to(tl.int64) * NS + i_s) * H + i_h
        tl.store(starts + at * K + o_k, b_d, mask=m_k)
        b_M = load_tile(M + at * (K * K), o_k, K, K, o_k, K)  # [BK, BK]
        delta = b_d - tl.load(guesses + at * K + o_k, mask=m_k, other=0.0)  # [BK]
        b_d = tl.load(ends + at * K + o_k, mask=m_k, other=0.0)  # [BK]
        if REVERSE:
            b_d += tl.sum(b_M * delta[:, None], 0)  # Mᵀ δ
        else:
            b_d += tl.sum(b_M * delta[None, :], 1)  # M δ


def transfers(
    k: Tensor,
    beta: Tensor,
    log_gamma: Tensor | None,
    inverse: Tensor,
    clipped: Tensor | None,
    chunks: Chunks,
    rule: Options,
) -> Tensor:
    """M of every segment [segments, H, K, K] float32, empty where there are none.

    With clipped, of the chunks before those alone.
    """
    T, H, K = k.shape[1:]
    M = transfers_like(k, chunks.cu_seqlens)
    if not len(M):
        return M
    segments = split(chunks, len(M) // chunks.sequences)
    config = launch("transfer", k, K, K)
    transfer_kernel[(segments.sequences * H * ceil_div(K, config["BV"]),)](
        k, beta, beta if log_gamma is None else log_gamma, inverse, M,
        beta if clipped is None else clipped, rule.eta, T, segments.segment,
        H=H, K=K, BT=CHUNK, BK=tile(K), HAS_GAMMA=log_gamma is not None,
        BETA_AWARE=rule.beta_aware, BOXED=clipped is not None,
        PREC="tf32" if precision(k) == "tf32x3" else precision(k), **config,
    )  # fmt: skip
    return M


def transfers_like(k: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Empty M, as `transfers` gives it."""
    B, T, H, K = k.shape
    # A step of this walk takes half the time of the memory's.
    count = 1 if cu_seqlens is not None else count_segments(B, T, H, ease=2)
    return k.new_empty(0 if count == 1 else B * count, H, K, K, dtype=torch.float32)


def join(walk: Walk, M: Tensor, initial: Tensor, chunks: Chunks, *, reverse: bool) -> Tensor:
    """What the walk leaves at each sequence's last end [N, H, K], its last starts being right.

    walk(starts [sequences, H, K], chunks) walks every sequence, or segment of one, of chunks, and
    returns what is left at its end, whose derivative is M [segments, H, K, K] or close to it; an
    empty M stands for whole sequences.
    """
    N, H, K = initial.shape
    if not len(M):
        return walk(initial, chunks)
    count = len(M) // N
    segments = split(chunks, count)
    guesses = initial.repeat_interleave(count, 0)
    for _ in range(ROUNDS):
        ends, starts = walk(guesses, segments), torch.empty_like(guesses)
        correct_kernel[(N * H,)](
            M, guesses, ends, initial, starts, count,
            H=H, K=K, BK=tile(K), REVERSE=reverse, num_warps=8 if K <= 128 else 16,
        )  # fmt: skip
        guesses = starts
    ends = walk(guesses, segments).view(N, count, H, K)
    return ends[:, 0 if reverse else -1].contiguous()
