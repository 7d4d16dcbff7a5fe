"""Phase 2 backward: one walk for dv and the gradient of the memory, then dq, dk, dw from spans.

With P = tril(q wᵀ), dS the gradient of a chunk's final memory and S the memory at its start:

    z = scale · Pᵀ do + w dS,   dv = Aᵀ z,   dS ← dS + scale · qᵀ do − kᵀ dv
    dw = e dSᵀ + scale · triu(e doᵀ) q − triu(e dvᵀ, 1) k
    dq = scale · (do Sᵀ + tril(do eᵀ) w)
    dk = −dv Sᵀ − tril(dv eᵀ, −1) w                       phase 1 adds its part

`memory_reverse_kernel` walks each sequence from its end with dSᵀ in float32 registers, the left
operand of its products as in `memory_forward`. It writes dv and e dSᵀ, so that dS itself never goes
through memory. `gradients_kernel` starts from Sᵀ at the start of each span, which the forward kept,
walks the span's chunks with Sᵀ in registers (Sᵀ ← Sᵀ + eᵀ w needs no solve, since e was kept), and
makes the rest, with the sums over dw that phase 1's reverse walk (`precond_backward`) wants:

    r_t = Σ_{i>t} exp(pre_i − post_t) ⟨dd_i, s_t⟩,   Σ_i exp(pre_i) dd_i,   dd = β dw ⊙ k.

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


@triton.jit(do_not_specialize=["T", "segment", "plane"])
def memory_reverse_kernel(
    q, k, w, A, e, do, dfinal, dv, dw, dinitial, cu_seqlens, offsets, scale, T, segment, plane,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    IS_VARLEN: tl.constexpr, SAVE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """If SAVE dv [B, T, H, V] and dw [blocks of V, B, T, H, K], e dSᵀ over one block; dinitial
    [N, H, K, V].

    Without SAVE, dfinal counts as zero. Grid: N · H · blocks of V; N counts segments where there
    are any. plane: numbers of one block's dw.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_h = tl.program_id(0) // NV % H
    i_n = tl.program_id(0) // (NV * H)
    begin, length, _ = locate_sequence(i_n, cu_seqlens, offsets, T, segment, BT, IS_VARLEN)
    NT = tl.cdiv(length, BT)
    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    causal = o_t[:, None] >= o_t[None, :]
    row = (begin + (NT - 1).to(tl.int64) * BT) * H + i_h
    q += row * K
    k += row * K
    w += row * K
    A += row * BT
    e += row * V
    do += row * V
    dv += row * V
    dw += i_v.to(tl.int64) * plane + row * K
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
        b_w = load_tile(w, o_t, left, H * K, o_k, K)  # [BT, BK]
        b_do = load_tile(do, o_t, left, H * V, o_v, V)  # [BT, BV]
        b_q = (b_q.to(tl.float32) * scale).to(type)
        b_P = tl.dot(b_q, tl.trans(b_w), input_precision=PREC)  # scale · q wᵀ [BT, BT]
        b_P = tl.where(causal, b_P, 0.0).to(type)

        # zᵀ, then dvᵀ, then dSᵀ: each product waits for the one before it.
        dS = b_dS.to(type)
        b_z = tl.dot(tl.trans(b_do), b_P, input_precision=PREC)  # [BV, BT]
        b_z = tl.dot(dS, tl.trans(b_w), b_z, input_precision=PREC)  # [BV, BT]
        b_A = load_tile(A, o_t, left, H * BT, o_t, BT)  # [BT, BT]
        b_dv = tl.dot(b_z.to(type), b_A, input_precision=PREC)  # zᵀ A [BV, BT]
        if SAVE:
            b_e = load_tile(e, o_t, left, H * V, o_v, V)  # [BT, BV]
            b_dw = tl.dot(b_e, dS, input_precision=PREC)  # [BT, BK]
            store_tile(dw, b_dw, o_t, left, H * K, o_k, K)
            store_transposed(dv, b_dv, o_v, V, H * V, o_t, left)
        b_k = load_tile(k, o_t, left, H * K, o_k, K)  # [BT, BK]
        b_dS = tl.dot(tl.trans(b_do), b_q, b_dS, input_precision=PREC)  # [BV, BK]
        b_dS = tl.dot((-b_dv).to(type), b_k, b_dS, input_precision=PREC)

        q -= BT * H * K
        k -= BT * H * K
        w -= BT * H * K
        A -= BT * H * BT
        e -= BT * H * V
        do -= BT * H * V
        dv -= BT * H * V
        dw -= BT * H * K
    store_transposed(dinitial + state, b_dS, o_v, V, V, o_k, K)


@triton.jit
def _values(e, do, dv, S, sums, b_w, o_t, left, o_v, H: tl.constexpr, V: tl.constexpr,
            PREC: tl.constexpr):  # fmt: skip
    """What one block of values adds to the sums over V; Sᵀ of the block after the chunk."""
    b_dq, b_dk, b_R, b_Rt, b_U, b_Ut = sums
    b_e = load_tile(e, o_t, left, H * V, o_v, V)  # [BT, BV]
    b_do = load_tile(do, o_t, left, H * V, o_v, V)  # [BT, BV]
    b_dv = load_tile(dv, o_t, left, H * V, o_v, V)  # [BT, BV]
    b_S = S.to(b_w.dtype)  # [BV, BK]
    b_dq = tl.dot(b_do, b_S, b_dq, input_precision=PREC)  # [BT, BK]
    b_dk = tl.dot(b_dv, b_S, b_dk, input_precision=PREC)  # [BT, BK]
    b_R = tl.dot(b_do, tl.trans(b_e), b_R, input_precision=PREC)  # [BT, BT]
    b_Rt = tl.dot(b_e, tl.trans(b_do), b_Rt, input_precision=PREC)
    b_U = tl.dot(b_dv, tl.trans(b_e), b_U, input_precision=PREC)
    b_Ut = tl.dot(b_e, tl.trans(b_dv), b_Ut, input_precision=PREC)
    S = tl.dot(tl.trans(b_e), b_w, S, input_precision=PREC)  # [BV, BK]
    return S, (b_dq, b_dk, b_R, b_Rt, b_U, b_Ut)


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


@triton.jit(do_not_specialize=["T", "plane"])
def gradients_kernel(
    q, k, w, e, do, dv, kept, beta, log_gamma, dq, dk, dw, r, dd,
    cu_seqlens, offsets, span_indices, scale, T, plane,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    NP: tl.constexpr, SPAN: tl.constexpr,
    HAS_GAMMA: tl.constexpr, IS_VARLEN: tl.constexpr, MOVES: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dq, dk (phase 2's part) and dw [B, T, H, K]; r [blocks of K, B, T, H] if MOVES, over one
    block; dd [chunks, H, K].

    dw [NP, B, T, H, K] holds e dSᵀ over blocks of V; its first plane becomes dw. plane: numbers of
    one. Grid: spans · H · blocks of K.
    """
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    i_k = tl.program_id(0) % NK
    i_h = tl.program_id(0) // NK % H
    i_s = tl.program_id(0) // (NK * H)
    begin, left = locate_chunk(i_s, cu_seqlens, span_indices, T, BT * SPAN, IS_VARLEN)
    if left <= 0:
        return
    if IS_VARLEN:
        i_n = tl.load(span_indices + 2 * i_s)
        i_c = tl.load(offsets + i_n) + tl.load(span_indices + 2 * i_s + 1) * SPAN
    else:
        NS = tl.cdiv(T, BT * SPAN)
        i_c = i_s // NS * tl.cdiv(T, BT) + i_s % NS * SPAN
    o_t = tl.arange(0, BT)
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    row = begin * H + i_h
    q += row * K
    k += row * K
    w += row * K
    dq += row * K
    dk += row * K
    dw += row * K
    e += row * V
    do += row * V
    dv += row * V
    beta += row
    log_gamma += row
    r += i_k.to(tl.int64) * (plane // K) + row
    dd += (i_c.to(tl.int64) * H + i_h) * K
    kept += (i_s.to(tl.int64) * H + i_h) * K * V
    type = q.dtype.element_ty

    # Sᵀ in up to four blocks [BV, BK]
    S0 = load_tile(kept, o_v, V, K, o_k, K).to(tl.float32)
    if NV > 1:
        S1 = load_tile(kept, o_v + BV, V, K, o_k, K).to(tl.float32)
    if NV > 2:
        S2 = load_tile(kept, o_v + 2 * BV, V, K, o_k, K).to(tl.float32)
        S3 = load_tile(kept, o_v + 3 * BV, V, K, o_k, K).to(tl.float32)
    left = tl.minimum(left, BT * SPAN)
    for _ in range(tl.cdiv(left, BT)):
        b_w = load_tile(w, o_t, left, H * K, o_k, K)  # [BT, BK]
        zero, square = tl.zeros([BT, BK], tl.float32), tl.zeros([BT, BT], tl.float32)
        sums = (zero, zero, square, square, square, square)
        S0, sums = _values(e, do, dv, S0, sums, b_w, o_t, left, o_v, H, V, PREC)
        if NV > 1:
            S1, sums = _values(e, do, dv, S1, sums, b_w, o_t, left, o_v + BV, H, V, PREC)
        if NV > 2:
            S2, sums = _values(e, do, dv, S2, sums, b_w, o_t, left, o_v + 2 * BV, H, V, PREC)
            S3, sums = _values(e, do, dv, S3, sums, b_w, o_t, left, o_v + 3 * BV, H, V, PREC)
        b_dq, b_dk, b_R, b_Rt, b_U, b_Ut = sums  # b_dk and b_U with the sign turned

        b_R = tl.where(o_t[:, None] >= o_t[None, :], b_R, 0.0).to(type)
        b_dq = tl.dot(b_R, b_w, b_dq, input_precision=PREC)
        store_tile(dq, b_dq * scale, o_t, left, H * K, o_k, K)
        b_U = tl.where(o_t[:, None] > o_t[None, :], b_U, 0.0).to(type)
        b_dk = tl.dot(b_U, b_w, b_dk, input_precision=PREC)
        store_tile(dk, -b_dk, o_t, left, H * K, o_k, K)

        b_q = load_tile(q, o_t, left, H * K, o_k, K)  # [BT, BK]
        b_k = load_tile(k, o_t, left, H * K, o_k, K)  # [BT, BK]
        b_Rt = tl.where(o_t[:, None] <= o_t[None, :], b_Rt * scale, 0.0).to(type)
        b_Ut = tl.where(o_t[:, None] < o_t[None, :], -b_Ut, 0.0).to(type)
        b_dw = tl.dot(b_Rt, b_q, input_precision=PREC)
        b_dw = tl.dot(b_Ut, b_k, b_dw, input_precision=PREC)
        for i_p in tl.static_range(NP):
            p = dw + i_p * plane
            b_dw += load_tile(p, o_t, left, H * K, o_k, K).to(tl.float32)
        store_tile(dw, b_dw, o_t, left, H * K, o_k, K)
        _couple(b_k, b_dw, beta, log_gamma, r, dd, o_t, left, o_k, H, K, HAS_GAMMA, MOVES, PREC)

        q += BT * H * K
        k += BT * H * K
        w += BT * H * K
        dq += BT * H * K
        dk += BT * H * K
        dw += BT * H * K
        e += BT * H * V
        do += BT * H * V
        dv += BT * H * V
        beta += BT * H
        log_gamma += BT * H
        r += BT * H
        dd += H * K
        left -= BT


def memory_reverse(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    A: Tensor,
    e: Tensor,
    do: Tensor,
    dfinal_state: Tensor,
    M: Tensor,
    chunks: Chunks,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dv, dw [blocks of V, B, T, H, K], dinitial_state); M as `memory` gave it."""
    blocks = triton.cdiv(do.shape[-1], launch("memory_reverse", q, q.shape[-1], do.shape[-1])["BV"])
    dv, dw = torch.empty_like(do), q.new_empty(blocks, *q.shape)
    if not len(M):
        dinitial = torch.empty_like(dfinal_state)
        _walk(q, k, w, A, e, do, dfinal_state, dv, dw, dinitial, chunks, rule)
        return dv, dw, dinitial
    chunks = split(chunks, len(M) // chunks.sequences)
    R = torch.empty(*M.shape[:-1], do.shape[-1], dtype=torch.float32, device=q.device)
    _walk(q, k, w, A, e, do, R, None, None, R, chunks, rule)
    ends, dinitial = link(M, R, dfinal_state, reverse=True)
    _walk(q, k, w, A, e, do, ends, dv, dw, R, chunks, rule)
    return dv, dw, dinitial


def _walk(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    A: Tensor,
    e: Tensor,
    do: Tensor,
    dfinal: Tensor,
    dv: Tensor | None,
    dw: Tensor | None,
    dinitial: Tensor,
    chunks: Chunks,
    rule: Rule,
) -> None:
    """Launch the reverse kernel; without dv and dw only dinitial is written, from zero."""
    (T, H, K), V = q.shape[1:], do.shape[-1]
    config = launch("memory_reverse", q, K, V)
    memory_reverse_kernel[(chunks.sequences * H * triton.cdiv(V, config["BV"]),)](
        q, k, w, A, e, do, dfinal, do if dv is None else dv, q if dw is None else dw, dinitial,
        chunks.cu_seqlens, chunks.offsets, rule.scale, T, chunks.segment, q.numel(),
        H=H, K=K, V=V, BT=CHUNK, BK=tile(K), IS_VARLEN=chunks.offsets is not None,
        SAVE=dv is not None, PREC=precision(q), **config,
    )  # fmt: skip


def gradients(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    e: Tensor,
    do: Tensor,
    dv: Tensor,
    kept: Tensor,
    beta: Tensor,
    log_gamma: Tensor | None,
    dw: Tensor,
    chunks: Chunks,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, phase 2's part of dk, dw, r [blocks of K, B, T, H], dd [chunks, H, K]).

    dw: as `memory_reverse` left it; its first plane is overwritten.
    """
    (B, T, H, K), V = q.shape, e.shape[-1]
    config = launch("gradients", q, K, V)
    blocks = triton.cdiv(K, config["BK"])
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    r, dd = beta.new_empty(blocks, B, T, H), beta.new_empty(chunks.bound, H, K)
    gradients_kernel[(chunks.spans.bound * H * blocks,)](
        q, k, w, e, do, dv, kept, beta, beta if log_gamma is None else log_gamma,
        dq, dk, dw, r, dd,
        chunks.cu_seqlens, chunks.offsets, chunks.spans.indices, rule.scale, T, q.numel(),
        H=H, K=K, V=V, BT=CHUNK, NP=len(dw), SPAN=cutting.SPAN,
        HAS_GAMMA=log_gamma is not None, IS_VARLEN=chunks.indices is not None,
        MOVES=not rule.constant_precond(log_gamma is not None), PREC=precision(q), **config,
    )  # fmt: skip
    return dq, dk, dw[0], r, dd
