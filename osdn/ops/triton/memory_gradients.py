"""Phase 2 backward, second part: dq and dk, span by span, and the gradient of log α.

With S the memory at a chunk's start, and e, dv and w of its tokens (`memory_backward`):

    dq = scale · (do Sᵀ + tril(do eᵀ) w)
    dk = −dv Sᵀ − tril(dv eᵀ, −1) w                       phase 1 adds its part

With a state decay α, D = exp(G_i − G_j), a = exp(G_i) and b = exp(G_C − G_j) of a chunk
(`gates.Decay`), do Sᵀ and dv Sᵀ are taken times a, and the two triangles times D, as
`memory_reverse` made and left them.

`gradients_kernel` starts from Sᵀ at the start of each span, which the forward kept, and walks the
span's chunks with Sᵀ in registers: Sᵀ ← exp(G_C) Sᵀ + eᵀ (b w) needs no solve, since e was kept.
Sums are in float32, operands of the dots in the inputs' dtype.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from osdn.ops.operands import Options
from osdn.ops.triton import chunks as cutting
from osdn.ops.triton.chunks import CHUNK, Chunks, ceil_div, load_tile, locate_chunk, store_tile
from osdn.ops.triton.config import launch, precision
from osdn.ops.triton.gates import Decay, load_end, load_gate, load_start, load_whole, scale_rows


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
    return tl.dot(b_R.to(b_w.dtype), b_w, b_y, input_precision=PREC)  # [BT, BK]


@triton.jit
def _read_decayed(p, S, p_R, b_w, factor, o_t, left, H: tl.constexpr, V: tl.constexpr,
                  BT: tl.constexpr, BV: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """factor ⊙ (x Sᵀ) + Rᵀ w [BT, BK] for x [BT, V] at p and R [BT, BT] at p_R, factor [BT]."""
    b_x = load_tile(p, o_t, left, H * V, tl.arange(0, BV), V)  # [BT, BV]
    b_y = tl.dot(b_x, S[0].to(b_x.dtype), input_precision=PREC)  # [BT, BK]
    for i in tl.static_range(1, len(S)):
        b_x = load_tile(p, o_t, left, H * V, i * BV + tl.arange(0, BV), V)
        b_y = tl.dot(b_x, S[i].to(b_x.dtype), b_y, input_precision=PREC)
    b_y *= factor[:, None]
    b_R = load_tile(p_R, o_t, left, H * BT, o_t, BT)  # [BT, BT]
    return tl.dot(tl.trans(b_R), b_w, b_y, input_precision=PREC)  # [BT, BK]


@triton.jit(do_not_specialize=["T", "rows"])
def gradients_kernel(
    q, k, w, ends, e, do, dv, kept, read_by, dkept, dq, dk, moved, found,
    cu_seqlens, span_indices, scale, unit, T, rows,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SPAN: tl.constexpr,
    IS_VARLEN: tl.constexpr, HAS_ALPHA: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dq and dk (phase 2's part) [B, T, H, K]; if HAS_ALPHA, what each block of K adds to moved
    [blocks of K, B, T, H], ⟨q, dq⟩ + ⟨k, dk⟩, and to found [blocks of K, spans, H], ⟨S, dS⟩ where
    the span starts. Grid: spans · H · blocks of K. rows: B T.

    read_by and dkept from `memory_reverse`, whose unit of dv the first has.
    """
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
    q += row * K
    k += row * K
    ends += row * 2
    read_by += row * BT
    moved += i_k.to(tl.int64) * rows * H + row
    kept += (i_s.to(tl.int64) * H + i_h) * K * V
    dkept += (i_s.to(tl.int64) * H + i_h) * K * V
    b_SdS = 0.0  # of this block of K

    S = ()  # Sᵀ in blocks [BV, BK]
    for i in tl.static_range((V + BV - 1) // BV):
        o_v = i * BV + tl.arange(0, BV)
        b_S = load_tile(kept, o_v, V, K, o_k, K).to(tl.float32)  # [BV, BK]
        if HAS_ALPHA:
            b_dS = load_tile(dkept, o_v, V, K, o_k, K)  # [BV, BK]
            b_SdS += tl.sum(tl.sum(b_S * b_dS, 1), 0)
        S = S + (b_S,)  # type: ignore[assignment]  # noqa: RUF005 (Triton knows no stars)
    if HAS_ALPHA:
        tl.store(found + i_k * (tl.num_programs(0) // NK) + i_s * H + i_h, b_SdS)
    left = tl.minimum(left, BT * SPAN)
    for i_t in range(tl.cdiv(left, BT)):
        rest = left - i_t * BT
        b_w = load_tile(w, o_t, rest, H * K, o_k, K)  # [BT, BK]
        E = ()
        for i in tl.static_range(len(S)):
            b_e = load_tile(e, o_t, rest, H * V, i * BV + tl.arange(0, BV), V)  # [BT, BV]
            E = E + (b_e,)  # type: ignore[assignment]  # noqa: RUF005
        if HAS_ALPHA:
            b_start = load_start(ends, o_t, rest, H)  # [BT]
            b_dq = _read_decayed(do, S, read_by, b_w, b_start, o_t, rest, H, V, BT, BV, PREC)
            b_dq *= scale
            store_tile(dq, b_dq, o_t, rest, H * K, o_k, K)
            b_moved = tl.sum(load_tile(q, o_t, rest, H * K, o_k, K) * b_dq, 1)  # [BT, BK] over K
            p_U = read_by + rows.to(tl.int64) * (H * BT)
            b_dk = _read_decayed(dv, S, p_U, b_w, b_start / -unit, o_t, rest, H, V, BT, BV, PREC)
            b_dk *= unit
            store_tile(dk, b_dk, o_t, rest, H * K, o_k, K)
            b_moved += tl.sum(load_tile(k, o_t, rest, H * K, o_k, K) * b_dk, 1)  # [BT, BK] over K
            tl.store(moved + o_t * H, b_moved, mask=o_t < rest)
            whole = load_whole(ends, rest, BT, H)
            b_w = scale_rows(b_w, load_end(ends, o_t, rest, H))
        else:
            b_dq = _read(do, E, S, b_w, o_t, rest, True, H, V, BV, PREC)
            store_tile(dq, b_dq * scale, o_t, rest, H * K, o_k, K)
            b_dk = _read(dv, E, S, b_w, o_t, rest, False, H, V, BV, PREC)
            store_tile(dk, -b_dk, o_t, rest, H * K, o_k, K)
        after = ()
        for i in tl.static_range(len(S)):
            b_S = S[i]  # [BV, BK]
            if HAS_ALPHA:
                b_S *= whole
            b_S = tl.dot(tl.trans(E[i]), b_w, b_S, input_precision=PREC)  # [BV, BK]
            after = after + (b_S,)  # type: ignore[assignment]  # noqa: RUF005
        S = after

        q += BT * H * K
        k += BT * H * K
        ends += BT * H * 2
        read_by += BT * H * BT
        moved += BT * H
        w += BT * H * K
        dq += BT * H * K
        dk += BT * H * K
        e += BT * H * V
        do += BT * H * V
        dv += BT * H * V


@triton.jit
def _last(x, is_there, y, there):
    """The later of two entries that is there; for scans."""
    return tl.where(there, y, x), is_there | there


@triton.jit(do_not_specialize=["T", "rows", "spans"])
def dlog_alpha_kernel(
    log_alpha, moved, written, found, dlog_alpha, cu_seqlens, span_indices, T, rows, spans,
    H: tl.constexpr, SIZE: tl.constexpr, NK: tl.constexpr, IS_VARLEN: tl.constexpr,
):  # fmt: skip
    """dlog_alpha [B, T, H]. Grid: spans · H. SIZE: tokens of a span; NK: blocks of K.

    Of the memory S̃_t that token t finds, dlog α_t = ⟨S̃_t, dS̃_t⟩, and from one token to the next it
    loses m_t = ⟨q, dq⟩ + ⟨k, dk⟩ − ⟨w, dw⟩. It is known where the span starts (found), and is 0
    where α_t is 0. The sum starts again there, so that no earlier rounding reaches later tokens.
    """
    i_h = tl.program_id(0) % H
    i_s = tl.program_id(0) // H
    begin, left = locate_chunk(i_s, cu_seqlens, span_indices, T, SIZE, IS_VARLEN)
    if left <= 0:
        return
    row = begin * H + i_h
    o_t = tl.arange(0, SIZE)
    b_m = -load_gate(written + row, o_t, left, H)  # [SIZE]
    b_g = 0.0
    for i in tl.static_range(NK):
        b_m += load_gate(moved + i * rows.to(tl.int64) * H + row, o_t, left, H)
        b_g += tl.load(found + i * spans * H + i_s * H + i_h)
    b_before = tl.cumsum(b_m, 0) - b_m
    reset = tl.exp(load_gate(log_alpha + row, o_t, left, H)) == 0.0
    b_from, there = tl.associative_scan((b_before, reset), 0, _last)
    b_g = tl.where(there, b_from, b_g) - b_before
    tl.store(dlog_alpha + row + o_t * H, b_g, mask=o_t < left)


def gradients(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    log_alpha: Tensor | None,
    decay: Decay | None,
    e: Tensor,
    do: Tensor,
    dv: Tensor,
    kept: Tensor,
    parts: list[Tensor],
    chunks: Chunks,
    rule: Options,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dq, phase 2's part of dk, dlog_alpha or None); kept [spans, H, V, K] from
    `memory_forward.memory`, parts from `memory_reverse`.
    """
    (B, T, H, K), V = w.shape, e.shape[-1]
    config = launch("gradients", w, K, V)
    blocks = ceil_div(K, config["BK"])
    dq, dk = torch.empty_like(w), torch.empty_like(w)
    read_by, written, dkept = parts or (w, w, w)
    spans, shape = chunks.spans, {"H": H, "IS_VARLEN": chunks.indices is not None}
    moved = found = dq
    if log_alpha is not None:
        moved = log_alpha.new_empty(blocks, B, T, H)
        found = log_alpha.new_empty(blocks, spans.bound, H)
    gradients_kernel[(spans.bound * H * blocks,)](
        q, k, w, w if decay is None else decay.ends, e, do, dv, kept, read_by, dkept,
        dq, dk, moved, found, chunks.cu_seqlens, spans.indices, rule.scale, rule.scale or 1.0,
        T, B * T, **shape, K=K, V=V, BT=CHUNK, SPAN=cutting.SPAN,
        HAS_ALPHA=decay is not None, PREC=precision(w), **config,
    )  # fmt: skip
    if log_alpha is None:
        return dq, dk, None
    dlog_alpha = torch.empty_like(log_alpha)
    dlog_alpha_kernel[(spans.bound * H,)](
        log_alpha, moved, written, found, dlog_alpha, chunks.cu_seqlens, spans.indices,
        T, B * T, spans.bound, **shape, SIZE=CHUNK * cutting.SPAN, NK=blocks, num_warps=1,
    )  # fmt: skip
    return dq, dk, dlog_alpha
