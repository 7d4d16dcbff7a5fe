"""Phase 2 backward: a walk from the end for dv, dw and dS; then dq and dk, span by span.

With P = tril(q wᵀ), dS the gradient of a chunk's final memory and S the memory at its start:

    z = scale · Pᵀ do + w dS,   dv = Aᵀ z,   dS ← dS + scale · qᵀ do − kᵀ dv
    dw = e dSᵀ + scale · triu(e doᵀ) q − triu(e dvᵀ, 1) k
    dq = scale · (do Sᵀ + tril(do eᵀ) w)
    dk = −dv Sᵀ − tril(dv eᵀ, −1) w                       phase 1 adds its part

`memory_reverse_kernel` walks each sequence from its end with dSᵀ in float32 registers, the left
operand of its products as in `memory_forward`. It writes dv and dw, so that dS itself never goes
through memory, and the sums over dw that phase 1's reverse walk (`precond_backward`) wants:

    r_t = Σ_{i>t} exp(pre_i − post_t) ⟨dd_i, s_t⟩,   Σ_i exp(pre_i) dd_i,   dd = β dw ⊙ k.

`gradients_kernel` starts from Sᵀ at the start of each span, which the forward kept, and walks the
span's chunks with Sᵀ in registers: Sᵀ ← Sᵀ + eᵀ w needs no solve, since e was kept.

Segments are joined as in `memory_forward`, by Mᵀ. Sums are in float32, operands of the dots in the
inputs' dtype. Wherever a product's transpose is wanted it is computed as a product of its own: on
Hopper, Triton 3.4 to 3.7.0 miscompiles a dot whose operand is another dot's result, transposed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from osdn.ops.rule import Rule
from osdn.ops.triton import chunks as cutting
from osdn.ops.triton.chunks import (
    CHUNK,
    Chunks,
    load_tile,
    load_transposed,
    locate_chunk,
    locate_sequence,
    split,
    store_tile,
    store_transposed,
    tile,
)
from osdn.ops.triton.config import launch, precision
from osdn.ops.triton.precond_gates import (
    across,
    decay,
    decay_from_start,
    down,
    load_gate,
    load_retention,
)
from osdn.ops.triton.segments import link


@triton.jit
def _couple(k, b_dw, beta, log_gamma, r, dd, o_t, left, o_k, H: tl.constexpr, K: tl.constexpr,
            HAS_GAMMA: tl.constexpr, MOVES: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """Of one chunk: r [BT] without what comes from later chunks, and Σ_i exp(pre_i) dd_i [BK]."""
    type: tl.constexpr = tl.bfloat16 if k.dtype == tl.bfloat16 else tl.float32
    b_k = k.to(tl.float32)
    b_dd = b_dw * (load_gate(beta, o_t, left, H)[:, None] * b_k)  # [BT, BK]
    pre, post, _ = load_retention(log_gamma, o_t, left, (0.0, 0.0), H, HAS_GAMMA)
    if MOVES:
        # ⟨dd_i, s_t⟩ [BT t, BT i]; s in float32 beside float16, where k² could overflow.
        b_G = tl.dot((b_k * b_k).to(type), tl.trans(b_dd.to(type)), input_precision=PREC)
        if HAS_GAMMA:
            b_G *= decay(across(pre), down(post))
        b_r = tl.sum(tl.where(o_t[None, :] > o_t[:, None], b_G, 0.0), 1)  # [BT]
        tl.store(r + o_t * H, b_r, mask=o_t < left)
    if HAS_GAMMA:
        b_dd *= decay_from_start(pre)[:, None]
    tl.store(dd + o_k, tl.sum(b_dd, 0), mask=o_k < K)


@triton.jit(do_not_specialize=["T", "segment", "rows", "plane"])
def memory_reverse_kernel(
    q, k, w, A, e, do, beta, log_gamma, dfinal, dv, dw, r, dd, dinitial,
    cu_seqlens, offsets, scale, T, segment, rows, plane,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_GAMMA: tl.constexpr, IS_VARLEN: tl.constexpr, MOVES: tl.constexpr, SAVE: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """dinitial [N, H, K, V]; if SAVE dv [B, T, H, V], and of each block of V its part of
    dw [blocks, B, T, H, K], dd [blocks, chunks, H, K] and if MOVES r [blocks, B, T, H].

    Without SAVE, dfinal counts as zero. Grid: N · H · blocks of V; N counts segments where there
    are any. rows: B T; plane: the chunks of one block's dd.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_h = tl.program_id(0) // NV % H
    i_n = tl.program_id(0) // (NV * H)
    begin, length, first = locate_sequence(i_n, cu_seqlens, offsets, T, segment, BT, IS_VARLEN)
    NT = tl.cdiv(length, BT)
    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    row = (begin + (NT - 1).to(tl.int64) * BT) * H + i_h
    q += row * K
    k += row * K
    w += row * K
    A += row * BT
    e += row * V
    do += row * V
    dv += row * V
    beta += row
    log_gamma += row
    dw += (i_v.to(tl.int64) * rows * H + row) * K
    r += i_v.to(tl.int64) * rows * H + row
    dd += ((i_v.to(tl.int64) * plane + first + NT - 1) * H + i_h) * K
    state = (i_n.to(tl.int64) * H + i_h) * K * V
    type = q.dtype.element_ty

    # b_dS is dSᵀ [BV, BK]
    if SAVE:
        b_dS = load_transposed(dfinal + state, o_v, V, V, o_k, K)
    else:
        b_dS = tl.zeros([BV, BK], tl.float32)
    for i_t in range(NT - 1, -1, -1):
        left = length - i_t * BT
        b_q = load_tile(q, o_t, left, H * K, o_k, K)  # [BT, BK]
        b_k = load_tile(k, o_t, left, H * K, o_k, K)  # [BT, BK]
        b_w = load_tile(w, o_t, left, H * K, o_k, K)  # [BT, BK]
        b_do = load_tile(do, o_t, left, H * V, o_v, V)  # [BT, BV]
        b_A = load_tile(A, o_t, left, H * BT, o_t, BT)  # [BT, BT]
        b_q = (b_q.to(tl.float32) * scale).to(type)
        b_P = tl.dot(b_q, tl.trans(b_w), input_precision=PREC)  # scale · q wᵀ [BT, BT]
        b_P = tl.where(o_t[:, None] >= o_t[None, :], b_P, 0.0).to(type)

        # zᵀ, then dvᵀ, then dSᵀ: each product waits for the one before it.
        dS = b_dS.to(type)
        b_z = tl.dot(tl.trans(b_do), b_P, input_precision=PREC)  # [BV, BT]
        b_z = tl.dot(dS, tl.trans(b_w), b_z, input_precision=PREC)  # [BV, BT]
        b_dv = tl.dot(b_z.to(type), b_A, input_precision=PREC).to(type)  # zᵀ A [BV, BT]
        b_dS = tl.dot(tl.trans(b_do), b_q, b_dS, input_precision=PREC)  # [BV, BK]
        b_dS = tl.dot(-b_dv, b_k, b_dS, input_precision=PREC)

        # dw: off that path.
        if SAVE:
            b_e = load_tile(e, o_t, left, H * V, o_v, V)  # [BT, BV]
            store_transposed(dv, b_dv, o_v, V, H * V, o_t, left)
            b_R = tl.dot(b_e, tl.trans(b_do), input_precision=PREC)  # [BT, BT]
            b_R = tl.where(o_t[:, None] <= o_t[None, :], b_R, 0.0).to(type)
            b_U = tl.dot(b_e, b_dv, input_precision=PREC)  # [BT, BT]
            b_U = tl.where(o_t[:, None] < o_t[None, :], -b_U, 0.0).to(type)
            b_dw = tl.dot(b_e, dS, input_precision=PREC)  # [BT, BK]
            b_dw = tl.dot(b_R, b_q, b_dw, input_precision=PREC)
            b_dw = tl.dot(b_U, b_k, b_dw, input_precision=PREC)
            store_tile(dw, b_dw, o_t, left, H * K, o_k, K)
            _couple(b_k, b_dw, beta, log_gamma, r, dd, o_t, left, o_k, H, K,
                    HAS_GAMMA, MOVES, PREC)  # fmt: skip

        q -= BT * H * K
        k -= BT * H * K
        w -= BT * H * K
        A -= BT * H * BT
        e -= BT * H * V
        do -= BT * H * V
        dv -= BT * H * V
        beta -= BT * H
        log_gamma -= BT * H
        dw -= BT * H * K
        r -= BT * H
        dd -= H * K
    store_transposed(dinitial + state, b_dS, o_v, V, V, o_k, K)


@triton.jit(do_not_specialize=["T"])
def gradients_kernel(
    w, e, do, dv, kept, dq, dk, cu_seqlens, span_indices, scale, T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SPAN: tl.constexpr,
    IS_VARLEN: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dq and dk (phase 2's part) [B, T, H, K]. Grid: spans · H · blocks of K."""
    NK: tl.constexpr = (K + BK - 1) // BK
    i_k = tl.program_id(0) % NK
    i_h = tl.program_id(0) // NK % H
    i_s = tl.program_id(0) // (NK * H)
    begin, left = locate_chunk(i_s, cu_seqlens, span_indices, T, BT * SPAN, IS_VARLEN)
    if left <= 0:
        return
    o_t = tl.arange(0, BT)
    o_k = i_k * BK + tl.arange(0, BK)
    row = begin * H + i_h
    w += row * K
    dq += row * K
    dk += row * K
    e += row * V
    do += row * V
    dv += row * V
    kept += (i_s.to(tl.int64) * H + i_h) * K * V

    S = ()  # Sᵀ in blocks [BV, BK]
    for i in tl.static_range((V + BV - 1) // BV):
        o_v = i * BV + tl.arange(0, BV)
        S = S + (load_tile(kept, o_v, V, K, o_k, K).to(tl.float32),)
    left = tl.minimum(left, BT * SPAN)
    for i_t in range(tl.cdiv(left, BT)):
        rest = left - i_t * BT
        b_w = load_tile(w, o_t, rest, H * K, o_k, K)  # [BT, BK]
        b_dq = tl.zeros([BT, BK], tl.float32)
        b_dk = tl.zeros([BT, BK], tl.float32)  # −dk
        b_R = tl.zeros([BT, BT], tl.float32)
        b_U = tl.zeros([BT, BT], tl.float32)
        after = ()
        for i in tl.static_range(len(S)):
            o_v = i * BV + tl.arange(0, BV)
            b_e = load_tile(e, o_t, rest, H * V, o_v, V)  # [BT, BV]
            b_do = load_tile(do, o_t, rest, H * V, o_v, V)  # [BT, BV]
            b_dv = load_tile(dv, o_t, rest, H * V, o_v, V)  # [BT, BV]
            b_S = S[i].to(b_w.dtype)
            b_R = tl.dot(b_do, tl.trans(b_e), b_R, input_precision=PREC)  # [BT, BT]
            b_U = tl.dot(b_dv, tl.trans(b_e), b_U, input_precision=PREC)  # [BT, BT]
            b_dq = tl.dot(b_do, b_S, b_dq, input_precision=PREC)  # [BT, BK]
            b_dk = tl.dot(b_dv, b_S, b_dk, input_precision=PREC)  # [BT, BK]
            after = after + (tl.dot(tl.trans(b_e), b_w, S[i], input_precision=PREC),)
        S = after
        b_R = tl.where(o_t[:, None] >= o_t[None, :], b_R, 0.0).to(b_w.dtype)
        b_dq = tl.dot(b_R, b_w, b_dq, input_precision=PREC)
        store_tile(dq, b_dq * scale, o_t, rest, H * K, o_k, K)
        b_U = tl.where(o_t[:, None] > o_t[None, :], b_U, 0.0).to(b_w.dtype)
        b_dk = tl.dot(b_U, b_w, b_dk, input_precision=PREC)
        store_tile(dk, -b_dk, o_t, rest, H * K, o_k, K)

        w += BT * H * K
        dq += BT * H * K
        dk += BT * H * K
        e += BT * H * V
        do += BT * H * V
        dv += BT * H * V


def memory_reverse(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    A: Tensor,
    e: Tensor,
    do: Tensor,
    beta: Tensor,
    log_gamma: Tensor | None,
    dfinal_state: Tensor,
    M: Tensor,
    chunks: Chunks,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dv, dw [B, T, H, K], r [B, T, H], dd [chunks, H, K], dinitial_state); M as `memory` gave it.

    dd is Σ_i exp(pre_i) dd_i of every chunk.
    """
    (B, T, H, K), V = q.shape, do.shape[-1]
    blocks = triton.cdiv(V, launch("memory_reverse", q, K, V)["BV"])
    dw = q.new_empty(blocks, B, T, H, K)
    r, dd = beta.new_empty(blocks, B, T, H), beta.new_empty(blocks, chunks.bound, H, K)
    found = torch.empty_like(do), dw, r, dd
    gates = (beta, log_gamma)
    if not len(M):
        dinitial = torch.empty_like(dfinal_state)
        _walk(q, k, w, A, e, do, *gates, dfinal_state, found, dinitial, chunks, rule)
    else:
        segments = split(chunks, len(M) // chunks.sequences)
        R = torch.empty(*M.shape[:-1], V, dtype=torch.float32, device=q.device)
        _walk(q, k, w, A, e, do, *gates, R, None, R, segments, rule)
        ends, dinitial = link(M, R, dfinal_state, reverse=True)
        _walk(q, k, w, A, e, do, *gates, ends, found, R, segments, rule)
    dv, *parts = found
    # One block wherever K and V are at most 128 and of 16 bits.
    dw, r, dd = (x[0] if blocks == 1 else x.sum(0) for x in parts)
    return dv, dw, r, dd, dinitial


def _walk(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    A: Tensor,
    e: Tensor,
    do: Tensor,
    beta: Tensor,
    log_gamma: Tensor | None,
    dfinal: Tensor,
    found: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    dinitial: Tensor,
    chunks: Chunks,
    rule: Rule,
) -> None:
    """Launch the reverse kernel; without found only dinitial is written, from zero."""
    (B, T, H, K), V = q.shape, do.shape[-1]
    config = launch("memory_reverse", q, K, V)
    memory_reverse_kernel[(chunks.sequences * H * triton.cdiv(V, config["BV"]),)](
        q, k, w, A, e, do, beta, beta if log_gamma is None else log_gamma, dfinal,
        *((do, q, beta, beta) if found is None else found), dinitial,
        chunks.cu_seqlens, chunks.offsets, rule.scale, T, chunks.segment, B * T, chunks.bound,
        H=H, K=K, V=V, BT=CHUNK, BK=tile(K), HAS_GAMMA=log_gamma is not None,
        IS_VARLEN=chunks.offsets is not None,
        MOVES=not rule.constant_precond(log_gamma is not None), SAVE=found is not None,
        PREC=precision(q), **config,
    )  # fmt: skip


def gradients(
    w: Tensor,
    e: Tensor,
    do: Tensor,
    dv: Tensor,
    kept: Tensor,
    chunks: Chunks,
    rule: Rule,
) -> tuple[Tensor, Tensor]:
    """(dq, phase 2's part of dk); kept [spans, H, V, K] from `memory_forward.memory`."""
    (T, H, K), V = w.shape[1:], e.shape[-1]
    config = launch("gradients", w, K, V)
    dq, dk = torch.empty_like(w), torch.empty_like(w)
    gradients_kernel[(chunks.spans.bound * H * triton.cdiv(K, config["BK"]),)](
        w, e, do, dv, kept, dq, dk, chunks.cu_seqlens, chunks.spans.indices, rule.scale, T,
        H=H, K=K, V=V, BT=CHUNK, SPAN=cutting.SPAN,
        IS_VARLEN=chunks.indices is not None, PREC=precision(w), **config,
    )  # fmt: skip
    return dq, dk
