"""Phase 2 backward, first part: a walk from the end for dv, dw and dS.

With P = tril(q wᵀ), dS the gradient of a chunk's final memory and S the memory at its start:

    z = scale · Pᵀ do + w dS,   dv = Aᵀ z,   dS ← dS + scale · qᵀ do − kᵀ dv
    dw = e dSᵀ + scale · triu(e doᵀ) q − triu(e dvᵀ, 1) k

With a state decay α, A as `write_keys` made it and D = exp(G_i − G_j), a = exp(G_i), b = exp(G_C −
G_j) of a chunk (`gates.Decay`):

    z = scale · (P ⊙ D)ᵀ do + b w dS,   dv = Aᵀ z
    dS ← exp(G_C) dS + scale · (a q)ᵀ do − kᵀ (a dv)
    dw = b e dSᵀ + scale · (triu(e doᵀ) ⊙ Dᵀ) q − (triu(e dvᵀ, 1) ⊙ Dᵀ) k

P ⊙ D is what the forward left, and the two triangles with Dᵀ are kept for `memory_gradients`.

`memory_reverse_kernel` walks each sequence from its end with dSᵀ in float32 registers, the left
operand of its products as in `memory_forward`. It writes dv and dw, so that dS itself never goes
through memory. Within the walk dS, z, dv and dw stand divided by scale, which then multiplies none
of the products' operands.

Segments are joined as in `memory_forward`, by Mᵀ. Sums are in float32, operands of the dots in the
inputs' dtype. Wherever a product's transpose is wanted it is computed as a product of its own: on
Hopper, Triton 3.4 to 3.7.0 miscompiles a dot whose operand is another dot's result, transposed. The
products of dw are added up outside of the dots: a dot whose result goes into another one is spread
over the rows of eight warps, and with 64 rows both halves of the warps would make all of it.
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
    ceil_div,
    load_tile,
    load_transposed,
    locate_sequence,
    span_bound,
    split,
    store_tile,
    store_transposed,
    tile,
)
from osdn.ops.triton.config import launch, precision
from osdn.ops.triton.gates import Decay, load_end, load_start, load_whole, scale_rows
from osdn.ops.triton.segments import link


@triton.jit(do_not_specialize=["T", "segment", "rows"])
def memory_reverse_kernel(
    q, k, w, A, between, ends, reads, e, do, dfinal, dv, dw, read_by, written, dkept, dinitial,
    cu_seqlens, offsets, span_offsets, scale, T, segment, rows,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SPAN: tl.constexpr,
    IS_VARLEN: tl.constexpr, SAVE: tl.constexpr, HAS_ALPHA: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dinitial [N, H, K, V]; if SAVE dv [B, T, H, V] and dw [blocks of V, B, T, H, K], what each
    block of V adds to dw. HAS_ALPHA: also what `gradients` needs, read_by [blocks of V, 2, B, T,
    H, BT], the two triangles of dw, that of dv less and divided by scale; written [blocks of V, B,
    T, H], ⟨w, dw⟩; and dkept [spans, H, V, K], dSᵀ at the start of every span, in w's dtype. reads
    as `memory` left it.

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
    dw += i_v.to(tl.int64) * rows * H * K
    read_by += i_v.to(tl.int64) * 2 * rows * H * BT
    written += i_v.to(tl.int64) * rows * H
    state = (i_n.to(tl.int64) * H + i_h) * K * V
    type = q.dtype.element_ty
    if HAS_ALPHA and SAVE:
        spans = tl.cdiv(segment, SPAN)
        _, _, first = locate_sequence(i_n, cu_seqlens, span_offsets, T, spans, BT * SPAN, IS_VARLEN)
        dkept += ((first + tl.cdiv(NT, SPAN) - 1) * H + i_h) * K * V  # of the last one

    # b_dS is dSᵀ [BV, BK]
    if SAVE:
        b_dS = load_transposed(dfinal + state, o_v, V, V, o_k, K) / scale
    else:
        b_dS = tl.zeros([BV, BK], tl.float32)
    for i_t in range(NT - 1, -1, -1):
        left = length - i_t * BT
        row = (begin + i_t * BT) * H + i_h
        b_w = load_tile(w + row * K, o_t, left, H * K, o_k, K)  # [BT, BK]
        b_do = load_tile(do + row * V, o_t, left, H * V, o_v, V)  # [BT, BV]
        if HAS_ALPHA:
            b_P = tl.trans(load_tile(reads + row * BT, o_t, left, H * BT, o_t, BT))  # [BT, BT]
            b_start = load_start(ends + row * 2, o_t, left, H)  # [BT]
            b_end = load_end(ends + row * 2, o_t, left, H)  # [BT]
            whole = load_whole(ends + row * 2, left, BT, H)
            b_w = scale_rows(b_w, b_end)
        else:
            b_q = load_tile(q + row * K, o_t, left, H * K, o_k, K)  # [BT, BK]
            b_P = tl.dot(b_q, tl.trans(b_w), input_precision=PREC)  # q wᵀ [BT, BT]
            b_P = tl.where(o_t[:, None] >= o_t[None, :], b_P, 0.0).to(type)
        b_A = load_tile(A + row * BT, o_t, left, H * BT, o_t, BT)  # [BT, BT]

        # zᵀ, then dvᵀ, then dSᵀ: each product waits for the one before it.
        dS = b_dS.to(type)
        b_z = tl.dot(tl.trans(b_do), b_P, input_precision=PREC)  # [BV, BT]
        b_z = tl.dot(dS, tl.trans(b_w), b_z, input_precision=PREC)  # [BV, BT]
        b_dv = tl.dot(b_z.to(type), b_A, input_precision=PREC)  # zᵀ A [BV, BT]
        if SAVE:
            store_transposed(dv + row * V, b_dv * scale, o_v, V, H * V, o_t, left)
        b_dv = b_dv.to(type)
        if HAS_ALPHA:
            b_dS *= whole
            b_q = load_tile(q + row * K, o_t, left, H * K, o_k, K)  # [BT, BK]
            b_x = scale_rows(b_q, b_start)
            b_dS = tl.dot(tl.trans(b_do), b_x, b_dS, input_precision=PREC)  # [BV, BK]
            b_k = load_tile(k + row * K, o_t, left, H * K, o_k, K)  # [BT, BK]
            b_x = scale_rows(b_k, b_start)
            b_dS = tl.dot(-b_dv, b_x, b_dS, input_precision=PREC)  # [BV, BK]
        else:
            b_k = load_tile(k + row * K, o_t, left, H * K, o_k, K)  # [BT, BK]
            b_dS = tl.dot(tl.trans(b_do), b_q, b_dS, input_precision=PREC)  # [BV, BK]
            b_dS = tl.dot(-b_dv, b_k, b_dS, input_precision=PREC)  # [BV, BK]

        # dw: off that path.
        if SAVE:
            b_e = load_tile(e + row * V, o_t, left, H * V, o_v, V)  # [BT, BV]
            b_dw = tl.dot(b_e, dS, input_precision=PREC) * scale  # [BT, BK]
            b_R = tl.dot(b_e, tl.trans(b_do), input_precision=PREC)  # [BT, BT]
            if HAS_ALPHA:
                b_dw *= b_end[:, None]
                b_D = load_tile(between + row * BT, o_t, left, H * BT, o_t, BT)  # [BT, BT]
                b_R = (b_R * b_D).to(type)
                store_tile(read_by + row * BT, b_R, o_t, left, H * BT, o_t, BT)
            else:
                b_R = tl.where(o_t[:, None] <= o_t[None, :], b_R, 0.0).to(type)
            b_dw += tl.dot(b_R, b_q, input_precision=PREC) * scale
            b_U = tl.dot(b_e, b_dv, input_precision=PREC)  # [BT, BT]
            if HAS_ALPHA:
                b_D = load_tile(between + row * BT, o_t, left, H * BT, o_t, BT)  # again, as w below
                b_U *= b_D
            b_U = tl.where(o_t[:, None] < o_t[None, :], -b_U, 0.0).to(type)
            if HAS_ALPHA:
                store_tile(read_by + (rows * H + row) * BT, b_U, o_t, left, H * BT, o_t, BT)
            b_dw += tl.dot(b_U, b_k, input_precision=PREC) * scale
            store_tile(dw + row * K, b_dw, o_t, left, H * K, o_k, K)
            if HAS_ALPHA:
                # Again: kept in registers all the way from above, it would be spilled.
                b_w = load_tile(w + row * K, o_t, left, H * K, o_k, K)  # [BT, BK]
                b_w_dw = tl.sum(b_w * b_dw, 1)  # [BT, BK] over K
                tl.store(written + row + o_t * H, b_w_dw, mask=o_t < left)
                if i_t % SPAN == 0:
                    store_tile(dkept, b_dS * scale, o_v, V, K, o_k, K)
                    dkept -= H * K * V
    store_transposed(dinitial + state, b_dS * scale, o_v, V, V, o_k, K)


def memory_reverse(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    A: Tensor,
    decay: Decay | None,
    e: Tensor,
    do: Tensor,
    dfinal_state: Tensor,
    M: Tensor,
    reads: Tensor,
    chunks: Chunks,
    rule: Options,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(dv, dw, dinitial_state, [read_by, written, dkept] with a state decay); M and reads as
    `memory` gave them.

    read_by [2, B, T, H, CHUNK], written [B, T, H] and dkept [spans, H, V, K]: what `gradients`
    takes.
    """
    (B, T, H, K), V = q.shape, do.shape[-1]
    blocks = ceil_div(V, launch("memory_reverse", q, K, V)["BV"])
    dv, dw = torch.empty_like(do), q.new_empty(blocks, *q.shape)
    parts = []
    if decay is not None:
        parts = [
            w.new_empty(blocks, 2, B, T, H, CHUNK),
            decay.ends.new_empty(blocks, B, T, H),
            w.new_empty(span_bound(B, T, chunks.cu_seqlens), H, V, K),
        ]
    if rule.scale == 0:  # nothing was read; the walk divides by scale
        do, rule = torch.zeros_like(do), rule._replace(scale=1.0)
    if not len(M):
        dinitial = torch.empty_like(dfinal_state)
        _walk(q, k, w, A, decay, reads, e, do, dfinal_state, dv, dw, parts, dinitial, chunks, rule)
    else:
        segments = split(chunks, len(M) // chunks.sequences)
        R = torch.empty(*M.shape[:-1], V, dtype=torch.float32, device=q.device)
        _walk(q, k, w, A, decay, reads, e, do, R, None, None, parts, R, segments, rule)
        ends, dinitial = link(M, R, dfinal_state, reverse=True)
        _walk(q, k, w, A, decay, reads, e, do, ends, dv, dw, parts, R, segments, rule)
    # One block wherever V is at most 128 and numbers have 16 bits.
    dw, *parts[:2] = (x[0] if blocks == 1 else x.sum(0) for x in (dw, *parts[:2]))
    return dv, dw, dinitial, parts


def _walk(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    A: Tensor,
    decay: Decay | None,
    reads: Tensor,
    e: Tensor,
    do: Tensor,
    dfinal: Tensor,
    dv: Tensor | None,
    dw: Tensor | None,
    parts: list[Tensor],
    dinitial: Tensor,
    chunks: Chunks,
    rule: Options,
) -> None:
    """Launch the reverse kernel; without dv and dw only dinitial is written, from zero."""
    (B, T, H, K), V = q.shape, do.shape[-1]
    config = launch("memory_reverse", q, K, V)
    read_by, written, dkept = parts or (w, dinitial, w)
    memory_reverse_kernel[(chunks.sequences * H * ceil_div(V, config["BV"]),)](
        q, k, w, A, *(decay or (A, A)), reads, e, do, dfinal,
        do if dv is None else dv, q if dw is None else dw, read_by, written, dkept, dinitial,
        chunks.cu_seqlens, chunks.offsets, chunks.spans.offsets, rule.scale, T, chunks.segment,
        B * T, H=H, K=K, V=V, BT=CHUNK, BK=tile(K), SPAN=cutting.SPAN,
        IS_VARLEN=chunks.offsets is not None, SAVE=dv is not None, HAS_ALPHA=decay is not None,
        PREC=precision(q), **config,
    )  # fmt: skip
