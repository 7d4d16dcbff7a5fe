"""Phase 2 backward: a walk from the end for dv, dw and dS; then dq and dk, span by span.

With P = tril(q wᵀ), dS the gradient of a chunk's final memory and S the memory at its start:

    z = scale · Pᵀ do + w dS,   dv = Aᵀ z,   dS ← dS + scale · qᵀ do − kᵀ dv
    dw = e dSᵀ + scale · triu(e doᵀ) q − triu(e dvᵀ, 1) k
    dq = scale · (do Sᵀ + tril(do eᵀ) w)
    dk = −dv Sᵀ − tril(dv eᵀ, −1) w                       phase 1 adds its part

`memory_reverse_kernel` walks each sequence from its end with dSᵀ in float32 registers, the left
operand of its products as in `memory_forward`. It writes dv and dw, so that dS itself never goes
through memory. Within the walk dS, z, dv and dw stand divided by scale, which then multiplies none
of the products' operands.

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

from osdn.ops.operands import Options
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
from osdn.ops.triton.segments import link


@triton.jit(do_not_specialize=["T", "segment", "rows"])
def memory_reverse_kernel(
    q, k, w, A, e, do, dfinal, dv, dw, dinitial, cu_seqlens, offsets, scale, T, segment, rows,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    IS_VARLEN: tl.constexpr, SAVE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dinitial [N, H, K, V]; if SAVE dv [B, T, H, V] and dw [blocks of V, B, T, H, K], what each
    block of V adds to dw.

    Without SAVE, dfinal counts as zero. Grid: N · H · blocks of V; N counts segments where there
    are any. rows: B T.
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
    row = (begin + (NT - 1).to(tl.int64) * BT) * H + i_h
    q += row * K
    k += row * K
    w += row * K
    A += row * BT
    e += row * V
    do += row * V
    dv += row * V
    dw += (i_v.to(tl.int64) * rows * H + row) * K
    state = (i_n.to(tl.int64) * H + i_h) * K * V
    type = q.dtype.element_ty

    # b_dS is dSᵀ [BV, BK]
    if SAVE:
        b_dS = load_transposed(dfinal + state, o_v, V, V, o_k, K) / scale
    else:
        b_dS = tl.zeros([BV, BK], tl.float32)
    for i_t in range(NT - 1, -1, -1):
        left = length - i_t * BT
        b_q = load_tile(q, o_t, left, H * K, o_k, K)  # [BT, BK]
        b_k = load_tile(k, o_t, left, H * K, o_k, K)  # [BT, BK]
        b_w = load_tile(w, o_t, left, H * K, o_k, K)  # [BT, BK]
        b_do = load_tile(do, o_t, left, H * V, o_v, V)  # [BT, BV]
        b_A = load_tile(A, o_t, left, H * BT, o_t, BT)  # [BT, BT]
        b_P = tl.dot(b_q, tl.trans(b_w), input_precision=PREC)  # q wᵀ [BT, BT]
        b_P = tl.where(o_t[:, None] >= o_t[None, :], b_P, 0.0).to(type)

        # zᵀ, then dvᵀ, then dSᵀ: each product waits for the one before it.
        dS = b_dS.to(type)
        b_z = tl.dot(tl.trans(b_do), b_P, input_precision=PREC)  # [BV, BT]
        b_z = tl.dot(dS, tl.trans(b_w), b_z, input_precision=PREC)  # [BV, BT]
        b_dv = tl.dot(b_z.to(type), b_A, input_precision=PREC)  # zᵀ A [BV, BT]
        if SAVE:
            store_transposed(dv, b_dv * scale, o_v, V, H * V, o_t, left)
        b_dv = b_dv.to(type)
        b_dS = tl.dot(tl.trans(b_do), b_q, b_dS, input_precision=PREC)  # [BV, BK]
        b_dS = tl.dot(-b_dv, b_k, b_dS, input_precision=PREC)

        # dw: off that path.
        if SAVE:
            b_e = load_tile(e, o_t, left, H * V, o_v, V)  # [BT, BV]
            b_dw = tl.dot(b_e, dS, input_precision=PREC)  # [BT, BK]
            b_R = tl.dot(b_e, tl.trans(b_do), input_precision=PREC)  # [BT, BT]
            b_R = tl.where(o_t[:, None] <= o_t[None, :], b_R, 0.0).to(type)
            b_dw = tl.dot(b_R, b_q, b_dw, input_precision=PREC)
            b_U = tl.dot(b_e, b_dv, input_precision=PREC)  # [BT, BT]
            b_U = tl.where(o_t[:, None] < o_t[None, :], -b_U, 0.0).to(type)
            b_dw = tl.dot(b_U, b_k, b_dw, input_precision=PREC)
            store_tile(dw, b_dw * scale, o_t, left, H * K, o_k, K)
        q -= BT * H * K
        k -= BT * H * K
        w -= BT * H * K
        A -= BT * H * BT
        e -= BT * H * V
        do -= BT * H * V
        dv -= BT * H * V
        dw -= BT * H * K
    store_transposed(dinitial + state, b_dS * scale, o_v, V, V, o_k, K)


@triton.jit
def _read(p, E, S, b_w, o_t, left, DIAGONAL: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
          BV: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """x Sᵀ + tril(x eᵀ) w [BT, BK] for x [BT, V] at p; the diagonal counts if DIAGONAL."""
    b_x = load_tile(p, o_t, left, H * V, tl.arange(0, BV), V)  # [BT, BV]
    b_R = tl.dot(b_x, tl.trans(E[0]), input_precision=PREC)  # [BT, BT]
    b_y = tl.dot(b_x, S[0].to(b_x.dtype), input_precision=PREC)  # [BT, BK]
    for i in tl.static_range(1, len(S)):
        b_x = load_tile(p, o_t, left, H * V, i * BV + tl.arange(0, BV), V)
        b_R = tl.dot(b_x, tl.trans(E[i]), b_R, input_precision=PREC)
        b_y = tl.dot(b_x, S[i].to(b_x.dtype), b_y, input_precision=PREC)
    if DIAGONAL:
        b_R = tl.where(o_t[:, None] >= o_t[None, :], b_R, 0.0)
    else:
        b_R = tl.where(o_t[:, None] > o_t[None, :], b_R, 0.0)
    return tl.dot(b_R.to(b_w.dtype), b_w, b_y, input_precision=PREC)


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
        b_S = load_tile(kept, o_v, V, K, o_k, K).to(tl.float32)
        S = S + (b_S,)  # type: ignore[assignment]  # noqa: RUF005 (Triton knows no stars)
    left = tl.minimum(left, BT * SPAN)
    for i_t in range(tl.cdiv(left, BT)):
        rest = left - i_t * BT
        b_w = load_tile(w, o_t, rest, H * K, o_k, K)  # [BT, BK]
        E = ()
        for i in tl.static_range(len(S)):
            b_e = load_tile(e, o_t, rest, H * V, i * BV + tl.arange(0, BV), V)  # [BT, BV]
            E = E + (b_e,)  # type: ignore[assignment]  # noqa: RUF005
        b_dq = _read(do, E, S, b_w, o_t, rest, True, H, V, BV, PREC)
        store_tile(dq, b_dq * scale, o_t, rest, H * K, o_k, K)
        b_dk = _read(dv, E, S, b_w, o_t, rest, False, H, V, BV, PREC)
        store_tile(dk, -b_dk, o_t, rest, H * K, o_k, K)
        after = ()
        for i in tl.static_range(len(S)):
            b_S = tl.dot(tl.trans(E[i]), b_w, S[i], input_precision=PREC)
            after = after + (b_S,)  # type: ignore[assignment]  # noqa: RUF005
        S = after

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
    dfinal_state: Tensor,
    M: Tensor,
    chunks: Chunks,
    rule: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dv, dw, dinitial_state); M as `memory` gave it."""
    V = do.shape[-1]
    blocks = triton.cdiv(V, launch("memory_reverse", q, q.shape[-1], V)["BV"])
    dv, dw = torch.empty_like(do), q.new_empty(blocks, *q.shape)
    if rule.scale == 0:  # nothing was read; the walk divides by scale
        do, rule = torch.zeros_like(do), rule._replace(scale=1.0)
    if not len(M):
        dinitial = torch.empty_like(dfinal_state)
        _walk(q, k, w, A, e, do, dfinal_state, dv, dw, dinitial, chunks, rule)
    else:
        segments = split(chunks, len(M) // chunks.sequences)
        R = torch.empty(*M.shape[:-1], V, dtype=torch.float32, device=q.device)
        _walk(q, k, w, A, e, do, R, None, None, R, segments, rule)
        ends, dinitial = link(M, R, dfinal_state, reverse=True)
        _walk(q, k, w, A, e, do, ends, dv, dw, R, segments, rule)
    # One block wherever V is at most 128 and numbers have 16 bits.
    return dv, dw[0] if blocks == 1 else dw.sum(0), dinitial


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
    rule: Options,
) -> None:
    """Launch the reverse kernel; without dv and dw only dinitial is written, from zero."""
    (B, T, H, K), V = q.shape, do.shape[-1]
    config = launch("memory_reverse", q, K, V)
    memory_reverse_kernel[(chunks.sequences * H * triton.cdiv(V, config["BV"]),)](
        q, k, w, A, e, do, dfinal, do if dv is None else dv, q if dw is None else dw, dinitial,
        chunks.cu_seqlens, chunks.offsets, rule.scale, T, chunks.segment, B * T,
        H=H, K=K, V=V, BT=CHUNK, BK=tile(K), IS_VARLEN=chunks.offsets is not None,
        SAVE=dv is not None, PREC=precision(q), **config,
    )  # fmt: skip


def gradients(
    w: Tensor,
    e: Tensor,
    do: Tensor,
    dv: Tensor,
    kept: Tensor,
    chunks: Chunks,
    rule: Options,
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
