"""Phase 2 backward: the memories again, their gradients in reverse, then dq, dk, dw in parallel.

With P = tril(q wᵀ) and dS the gradient of a chunk's final memory, S the memory at its start:

    z = scale · Pᵀ do + w dS,   dv = Aᵀ z,   dS ← dS + scale · qᵀ do − (A k)ᵀ z
    dq = scale · (do Sᵀ + tril(do eᵀ) w)
    dk = −dv Sᵀ − tril(dv eᵀ, −1) w                       phase 1 adds its part
    dw = e dSᵀ + scale · triu(e doᵀ) q − triu(e dvᵀ, 1) k

S ← S + wᵀ e needs no solve, since e was kept. Segments are joined as in `memory_forward`, by Mᵀ.
Wherever a product's transpose is wanted it is computed as a product of its own: on Hopper, Triton
3.4 to 3.7.0 miscompiles a dot whose operand is another dot's result, transposed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from osdn.ops.operands import Options
from osdn.ops.triton.chunks import (
    CHUNK,
    Chunks,
    load_tile,
    locate_chunk,
    locate_sequence,
    split,
    store_tile,
    tile,
)
from osdn.ops.triton.config import launch, precision
from osdn.ops.triton.segments import link


@triton.jit(do_not_specialize=["T", "segment"])
def states_kernel(
    w, e, initial, S, cu_seqlens, offsets, T, segment,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    IS_VARLEN: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """S [chunks, H, K, V] at each chunk's start, in w's dtype. Grid: N · H · blocks of K and V."""
    NV: tl.constexpr = (V + BV - 1) // BV
    NK: tl.constexpr = (K + BK - 1) // BK
    i_v = tl.program_id(0) % NV
    i_k = tl.program_id(0) // NV % NK
    i_h = tl.program_id(0) // (NV * NK) % H
    i_n = tl.program_id(0) // (NV * NK * H)
    begin, length, first = locate_sequence(i_n, cu_seqlens, offsets, T, segment, BT, IS_VARLEN)
    o_t = tl.arange(0, BT)
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    row = begin * H + i_h
    w += row * K
    e += row * V
    S += (first * H + i_h) * K * V

    b_S = load_tile(initial + (i_n.to(tl.int64) * H + i_h) * K * V, o_k, K, V, o_v, V)
    for i_t in range(tl.cdiv(length, BT)):
        store_tile(S, b_S, o_k, K, V, o_v, V)
        left = length - i_t * BT
        b_w = load_tile(w, o_t, left, H * K, o_k, K)
        b_e = load_tile(e, o_t, left, H * V, o_v, V)
        b_S += tl.dot(tl.trans(b_w), b_e, input_precision=PREC)
        w += BT * H * K
        e += BT * H * V
        S += H * K * V


@triton.jit(do_not_specialize=["T", "segment"])
def memory_reverse_kernel(
    q, w, ka, A, do, dfinal, dv, dS, dinitial, cu_seqlens, offsets, scale, T, segment,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    IS_VARLEN: tl.constexpr, SAVE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dv [B, T, H, V] and dS [chunks, H, K, V] if SAVE, dinitial [N, H, K, V].

    Without SAVE, dfinal counts as zero. Grid: N · H · blocks of V; N counts segments where there
    are any.
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
    acausal = o_t[:, None] <= o_t[None, :]
    row = (begin + (NT - 1).to(tl.int64) * BT) * H + i_h
    q += row * K
    w += row * K
    ka += row * K
    A += row * BT
    do += row * V
    dv += row * V
    dS += ((first + NT - 1) * H + i_h) * K * V
    state = (i_n.to(tl.int64) * H + i_h) * K * V
    type = q.dtype.element_ty

    if SAVE:
        b_dS = load_tile(dfinal + state, o_k, K, V, o_v, V)
    else:
        b_dS = tl.zeros([BK, BV], tl.float32)
    for i_t in range(NT - 1, -1, -1):
        left = length - i_t * BT
        b_q = load_tile(q, o_t, left, H * K, o_k, K)
        b_w = load_tile(w, o_t, left, H * K, o_k, K)
        b_ka = load_tile(ka, o_t, left, H * K, o_k, K)
        b_do = load_tile(do, o_t, left, H * V, o_v, V)
        if SAVE:
            # Aᵀ, read transposed: column j of the tile is row j of A.
            m_A = o_t[None, :] < left
            b_At = tl.load(A + o_t[None, :] * (H * BT) + o_t[:, None], mask=m_A, other=0.0)
            store_tile(dS, b_dS, o_k, K, V, o_v, V)

        b_Pt = tl.dot(b_w, tl.trans(b_q), input_precision=PREC)
        b_Pt = tl.where(acausal, b_Pt * scale, 0.0).to(type)
        b_z = tl.dot(b_Pt, b_do, input_precision=PREC)
        b_z += tl.dot(b_w, b_dS.to(type), input_precision=PREC)
        b_z = b_z.to(type)
        b_dS += scale * tl.dot(tl.trans(b_q), b_do, input_precision=PREC)
        b_dS -= tl.dot(tl.trans(b_ka), b_z, input_precision=PREC)
        if SAVE:
            b_dv = tl.dot(b_At, b_z, input_precision=PREC)
            store_tile(dv, b_dv, o_t, left, H * V, o_v, V)

        q -= BT * H * K
        w -= BT * H * K
        ka -= BT * H * K
        A -= BT * H * BT
        do -= BT * H * V
        dv -= BT * H * V
        dS -= H * K * V
    store_tile(dinitial + state, b_dS, o_k, K, V, o_v, V)


@triton.jit(do_not_specialize=["T"])
def gradients_kernel(
    q, k, w, e, do, dv, S, dS, dq, dk, dw, cu_seqlens, indices, scale, T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    IS_VARLEN: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dq, dk (phase 2's part) and dw [B, T, H, K]. Grid: chunks · H · blocks of K."""
    NK: tl.constexpr = (K + BK - 1) // BK
    i_k = tl.program_id(0) % NK
    i_h = tl.program_id(0) // NK % H
    i_c = tl.program_id(0) // (NK * H)
    begin, left = locate_chunk(i_c, cu_seqlens, indices, T, BT, IS_VARLEN)
    if left <= 0:
        return
    o_t = tl.arange(0, BT)
    o_k = i_k * BK + tl.arange(0, BK)
    row = begin * H + i_h
    e += row * V
    do += row * V
    dv += row * V
    S += (i_c.to(tl.int64) * H + i_h) * K * V
    dS += (i_c.to(tl.int64) * H + i_h) * K * V
    type = q.dtype.element_ty

    b_dq = tl.zeros([BT, BK], tl.float32)
    b_dk = tl.zeros([BT, BK], tl.float32)
    b_dw = tl.zeros([BT, BK], tl.float32)
    b_R = tl.zeros([BT, BT], tl.float32)  # do eᵀ
    b_Rt = tl.zeros([BT, BT], tl.float32)
    b_U = tl.zeros([BT, BT], tl.float32)  # dv eᵀ
    b_Ut = tl.zeros([BT, BT], tl.float32)
    for i_v in range(tl.cdiv(V, BV)):
        o_v = i_v * BV + tl.arange(0, BV)
        b_e = load_tile(e, o_t, left, H * V, o_v, V)
        b_do = load_tile(do, o_t, left, H * V, o_v, V)
        b_dv = load_tile(dv, o_t, left, H * V, o_v, V)
        b_S = load_tile(S, o_k, K, V, o_v, V)
        b_dS = load_tile(dS, o_k, K, V, o_v, V)
        b_dq += tl.dot(b_do, tl.trans(b_S), input_precision=PREC)
        b_dk -= tl.dot(b_dv, tl.trans(b_S), input_precision=PREC)
        b_dw += tl.dot(b_e, tl.trans(b_dS), input_precision=PREC)
        b_R += tl.dot(b_do, tl.trans(b_e), input_precision=PREC)
        b_Rt += tl.dot(b_e, tl.trans(b_do), input_precision=PREC)
        b_U += tl.dot(b_dv, tl.trans(b_e), input_precision=PREC)
        b_Ut += tl.dot(b_e, tl.trans(b_dv), input_precision=PREC)

    b_w = load_tile(w + row * K, o_t, left, H * K, o_k, K)
    b_R = tl.where(o_t[:, None] >= o_t[None, :], b_R, 0.0).to(type)
    b_U = tl.where(o_t[:, None] > o_t[None, :], b_U, 0.0).to(type)
    b_dq += tl.dot(b_R, b_w, input_precision=PREC)
    b_dk -= tl.dot(b_U, b_w, input_precision=PREC)
    store_tile(dq + row * K, b_dq * scale, o_t, left, H * K, o_k, K)
    store_tile(dk + row * K, b_dk, o_t, left, H * K, o_k, K)
    b_q = load_tile(q + row * K, o_t, left, H * K, o_k, K)
    b_k = load_tile(k + row * K, o_t, left, H * K, o_k, K)
    b_Rt = tl.where(o_t[:, None] <= o_t[None, :], b_Rt * scale, 0.0).to(type)
    b_Ut = tl.where(o_t[:, None] < o_t[None, :], b_Ut, 0.0).to(type)
    b_dw += tl.dot(b_Rt, b_q, input_precision=PREC)
    b_dw -= tl.dot(b_Ut, b_k, input_precision=PREC)
    store_tile(dw + row * K, b_dw, o_t, left, H * K, o_k, K)


def states(
    w: Tensor, e: Tensor, initial_state: Tensor, segments: list[Tensor], chunks: Chunks
) -> Tensor:
    """S [chunks, H, K, V] at every chunk's start, in w's dtype; segments as `memory` left them."""
    (T, H, K), V = w.shape[1:], e.shape[-1]
    config = launch("states", w, K, V)
    blocks = triton.cdiv(K, config["BK"]) * triton.cdiv(V, config["BV"])
    S = w.new_empty(chunks.bound, H, K, V)
    if segments:
        initial_state = segments[1]
        chunks = split(chunks, len(initial_state) // chunks.sequences)
    states_kernel[(chunks.sequences * H * blocks,)](
        w, e, initial_state, S, chunks.cu_seqlens, chunks.offsets, T, chunks.segment,
        H=H, K=K, V=V, BT=CHUNK,
        IS_VARLEN=chunks.offsets is not None, PREC=precision(w), **config,
    )  # fmt: skip
    return S


def memory_reverse(
    q: Tensor,
    w: Tensor,
    ka: Tensor,
    A: Tensor,
    do: Tensor,
    dfinal_state: Tensor,
    segments: list[Tensor],
    chunks: Chunks,
    rule: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dv, dS [chunks, H, K, V] at every chunk's end, dinitial_state)."""
    H, K, V = *q.shape[2:], do.shape[-1]
    dv, dS = torch.empty_like(do), q.new_empty(chunks.bound, H, K, V)
    if not segments:
        dinitial = torch.empty_like(dfinal_state)
        _walk(q, w, ka, A, do, dfinal_state, dv, dS, dinitial, chunks, rule)
        return dv, dS, dinitial
    M, starts = segments
    chunks = split(chunks, len(starts) // chunks.sequences)
    R = torch.empty_like(starts)
    _walk(q, w, ka, A, do, R, None, None, R, chunks, rule)
    ends, dinitial = link(M, R, dfinal_state, reverse=True)
    _walk(q, w, ka, A, do, ends, dv, dS, R, chunks, rule)
    return dv, dS, dinitial


def _walk(
    q: Tensor,
    w: Tensor,
    ka: Tensor,
    A: Tensor,
    do: Tensor,
    dfinal: Tensor,
    dv: Tensor | None,
    dS: Tensor | None,
    dinitial: Tensor,
    chunks: Chunks,
    rule: Options,
) -> None:
    """Launch the reverse kernel; without dv and dS only dinitial is written, from zero."""
    (T, H, K), V = q.shape[1:], do.shape[-1]
    config = launch("memory_reverse", q, K, V)
    memory_reverse_kernel[(chunks.sequences * H * triton.cdiv(V, config["BV"]),)](
        q, w, ka, A, do, dfinal, do if dv is None else dv, q if dS is None else dS, dinitial,
        chunks.cu_seqlens, chunks.offsets, rule.scale, T, chunks.segment,
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
    S: Tensor,
    dS: Tensor,
    chunks: Chunks,
    rule: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, phase 2's part of dk, dw)."""
    (T, H, K), V = q.shape[1:], e.shape[-1]
    config = launch("gradients", q, K, V)
    dq, dk, dw = (torch.empty_like(k) for _ in range(3))
    gradients_kernel[(chunks.bound * H * triton.cdiv(K, config["BK"]),)](
        q, k, w, e, do, dv, S, dS, dq, dk, dw, chunks.cu_seqlens, chunks.indices, rule.scale, T,
        H=H, K=K, V=V, BT=CHUNK,
        IS_VARLEN=chunks.indices is not None, PREC=precision(q), **config,
    )  # fmt: skip
    return dq, dk, dw
