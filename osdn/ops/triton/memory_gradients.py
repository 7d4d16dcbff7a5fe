"""Phase 2 backward, second part: dq and dk, span by span, and the gradient of log α.

With S the memory at a chunk's start, and e, dv and w of its tokens (`memory_backward`):

    dq = scale · (do Sᵀ + tril(do eᵀ) w)
    dk = −dv Sᵀ − tril(dv eᵀ, −1) w                       phase 1 adds its part

With a state decay α, D = exp(G_i − G_j), a = exp(G_i) and b = exp(G_C − G_j) of a chunk
(`gates.Decay`), do Sᵀ and dv Sᵀ are taken times a, and the two triangles times D.

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
from osdn.ops.triton.gates import Decay, load_end, load_gate, load_start, load_whole


@triton.jit
def _read(p, E, S, b_w, p_key, b_D, b_start, o_t, left, o_k,
          DIAGONAL: tl.constexpr, HAS_ALPHA: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
          V: tl.constexpr, BV: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """x Sᵀ + tril(x eᵀ) w [BT, BK] for x [BT, V] at p; the diagonal counts if DIAGONAL.

    HAS_ALPHA: its two terms times a and G. With the key that reads, q or k at p_key, also start and
    turn [BT] of `_dlog_alpha`: ⟨key, a x Sᵀ⟩, and of M = tril(x eᵀ, −1) ⊙ G ⊙ (key wᵀ) the sum of
    each row less that of each column.
    """
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
    start, turn = 0.0, 0.0
    if HAS_ALPHA:
        b_key = load_tile(p_key, o_t, left, H * K, o_k, K)  # [BT, BK]
        b_R *= b_D
        b_y *= b_start[:, None]
        start = tl.sum(b_key * b_y, 1)  # [BT, BK] over K
        b_M = b_R * tl.dot(b_key, tl.trans(b_w), input_precision=PREC)  # [BT, BT]
        b_M = tl.where(o_t[:, None] > o_t[None, :], b_M, 0.0)
        turn = tl.sum(b_M, 1) - tl.sum(b_M, 0)  # [BT]
    b_y = tl.dot(b_R.to(b_w.dtype), b_w, b_y, input_precision=PREC)  # [BT, BK]
    return b_y, start, turn


@triton.jit
def _dlog_alpha(turn, start, ended, whole, log_alpha):
    """The gradient of a chunk's log α [BT], from each decay times its own gradient.

    A decay holds α_t as a factor if it begins before t and ends at t or later: exp(G_i − G_j) with
    j < t ≤ i, times its gradient M_ij; exp(G_i) with t ≤ i (start [BT]); exp(G_C − G_j) with j < t
    (ended [BT]); and exp(G_C) (whole). The first of these sums is that of turn over i ≥ t, since
    what M holds between two tokens from t on is in a row and in a column. Only numbers of one chunk
    cancel there, in float32; after a hard reset, whose own gradient is exactly 0, nothing does.
    """
    b_g = tl.cumsum(turn + start, 0, reverse=True) + (tl.cumsum(ended, 0) - ended) + whole
    return tl.where(tl.exp(log_alpha) == 0.0, 0.0, b_g)


@triton.jit(do_not_specialize=["T", "rows"])
def gradients_kernel(
    q, k, w, log_alpha, between, ends, e, do, dv, kept, ended, dkept, dq, dk, dlog_alpha,
    cu_seqlens, span_indices, scale, T, rows,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SPAN: tl.constexpr,
    IS_VARLEN: tl.constexpr, HAS_ALPHA: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dq and dk (phase 2's part) [B, T, H, K]; if HAS_ALPHA dlog_alpha [blocks of K, B, T, H], what
    each block of K adds. Grid: spans · H · blocks of K. rows: B T.

    ended [B, T, H] and dkept from `memory_reverse`. With S and dS the memory at a chunk's start and
    its gradient, ⟨S, dS⟩ less Σ start is exp(G_C) times the gradient of that; with Σ ended added it
    is ⟨S, dS⟩ at the next chunk's start. So it is found through a span, from S and dS kept.
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
    between += row * BT
    ends += row * 2
    log_alpha += row
    ended += row
    dlog_alpha += i_k.to(tl.int64) * rows * H + row
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
    left = tl.minimum(left, BT * SPAN)
    for i_t in range(tl.cdiv(left, BT)):
        rest = left - i_t * BT
        b_w = load_tile(w, o_t, rest, H * K, o_k, K)  # [BT, BK]
        E = ()
        for i in tl.static_range(len(S)):
            b_e = load_tile(e, o_t, rest, H * V, i * BV + tl.arange(0, BV), V)  # [BT, BV]
            E = E + (b_e,)  # type: ignore[assignment]  # noqa: RUF005
        b_D, b_start = 0.0, 0.0
        if HAS_ALPHA:
            b_D = load_tile(between, o_t, rest, H * BT, o_t, BT)  # [BT, BT]
            b_start = load_start(ends, o_t, rest, H)  # [BT]
            whole = load_whole(ends, rest, BT, H)
        b_dq, s_q, t_q = _read(do, E, S, b_w, q, b_D, b_start, o_t, rest, o_k, True, HAS_ALPHA,
                               H, K, V, BV, PREC)  # fmt: skip
        store_tile(dq, b_dq * scale, o_t, rest, H * K, o_k, K)
        b_dk, s_k, t_k = _read(dv, E, S, b_w, k, b_D, b_start, o_t, rest, o_k, False, HAS_ALPHA,
                               H, K, V, BV, PREC)  # fmt: skip
        store_tile(dk, -b_dk, o_t, rest, H * K, o_k, K)
        if HAS_ALPHA:
            b_end = load_gate(ended, o_t, tl.where(i_k == 0, rest, 0), H)  # one block counts it
            b_read = scale * s_q - s_k  # [BT]
            b_SdS = tl.where(whole > 0, b_SdS - tl.sum(b_read, 0), 0.0)
            b_dg = _dlog_alpha(
                scale * t_q - t_k, b_read, b_end, b_SdS, load_gate(log_alpha, o_t, rest, H)
            )
            tl.store(dlog_alpha + o_t * H, b_dg, mask=o_t < rest)
            b_SdS += tl.sum(b_end, 0)
            b_w = (b_w * load_end(ends, o_t, rest, H)[:, None]).to(b_w.dtype)
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
        between += BT * H * BT
        ends += BT * H * 2
        log_alpha += BT * H
        ended += BT * H
        dlog_alpha += BT * H
        w += BT * H * K
        dq += BT * H * K
        dk += BT * H * K
        e += BT * H * V
        do += BT * H * V
        dv += BT * H * V


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
    dq, dk, dlog_alpha = torch.empty_like(w), torch.empty_like(w), None
    if log_alpha is not None:
        dlog_alpha = log_alpha.new_empty(blocks, B, T, H)
    ended, dkept = parts or (w, w)
    gradients_kernel[(chunks.spans.bound * H * blocks,)](
        q, k, w, w if log_alpha is None else log_alpha, *(decay or (w, w)),
        e, do, dv, kept, ended, dkept, dq, dk, dk if dlog_alpha is None else dlog_alpha,
        chunks.cu_seqlens, chunks.spans.indices, rule.scale, T, B * T,
        H=H, K=K, V=V, BT=CHUNK, SPAN=cutting.SPAN, IS_VARLEN=chunks.indices is not None,
        HAS_ALPHA=decay is not None, PREC=precision(w), **config,
    )  # fmt: skip
    if dlog_alpha is not None:
        dlog_alpha = dlog_alpha[0] if blocks == 1 else dlog_alpha.sum(0)
    return dq, dk, dlog_alpha
