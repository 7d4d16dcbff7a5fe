"""Phase 2: residuals, reads and the memory, walking the chunks of a sequence in order.

With S the memory at a chunk's start, and w and A = (I + tril(k wᵀ, −1))⁻¹ from `write_keys`:

    e = A (v − k S),   o = scale · (q S + tril(q wᵀ) e),   S ← S + wᵀ e.

With a state decay α let G_t = Σ log α from the chunk's start up to and with token t (`gates`). Then

    A = (I + tril(k wᵀ ⊙ exp(G_i − G_j), −1))⁻¹,     e = A (v − exp(G) k S),
    o = scale · (exp(G) q S + tril(q wᵀ ⊙ exp(G_i − G_j)) e),
    S ← exp(G_C) S + wᵀ (exp(G_C − G) e).

Grid: one program for a sequence, a head and BV columns of S; columns do not interact. The program
holds Sᵀ [BV, BK] in float32 registers and writes every product as a transpose,

    eᵀ = (vᵀ − Sᵀ kᵀ) Aᵀ,   oᵀ = scale · (Sᵀ qᵀ + eᵀ tril(q wᵀ)ᵀ),   Sᵀ ← Sᵀ + eᵀ w,

so that what one product leaves is the left operand of the next. On Hopper a left operand comes from
registers: nothing on the path from chunk to chunk goes through shared memory. Operands of the dots
are in the input's dtype, sums in float32.

Where few heads and sequences would leave the GPU idle, the walk is cut into segments
(`chunks.split`): a first pass computes each segment's map S → M S + U, from the identity without v
and from zero with it; `segments.link` joins them; a second walks from the exact starts in parallel.
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
    count_segments,
    load_tile,
    load_transposed,
    locate_sequence,
    split,
    store_tile,
    store_transposed,
    tile,
)
from osdn.ops.triton.config import launch, precision
from osdn.ops.triton.gates import Decay, load_end, load_start, load_whole, scale_rows
from osdn.ops.triton.segments import link


@triton.jit(do_not_specialize=["T", "segment"])
def memory_kernel(
    q, k, w, v, A, between, ends, initial, o, e, kept, reads, final,
    cu_seqlens, offsets, span_offsets, scale, T, segment,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SPAN: tl.constexpr,
    IS_VARLEN: tl.constexpr, VALUES: tl.constexpr, READ: tl.constexpr, SAVE: tl.constexpr,
    HAS_ALPHA: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """o [B, T, H, V] if READ, final [N, H, K, V], and if SAVE e [B, T, H, V] and
    kept [spans, H, V, K]: Sᵀ at the start of every span, in w's dtype; HAS_ALPHA: and
    reads [B, T, H, BT], (tril(q wᵀ) ⊙ exp(G_i − G_j))ᵀ.

    Grid: N · H · blocks of V; N counts segments where there are any. VALUES: v is there, else it is
    zero. Without READ the walk begins from zero, or where there are no values from the identity.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_h = tl.program_id(0) // NV % H
    i_n = tl.program_id(0) // (NV * H)
    begin, length, _ = locate_sequence(i_n, cu_seqlens, offsets, T, segment, BT, IS_VARLEN)
    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    causal = o_t[:, None] <= o_t[None, :]  # rows are writes, columns reads
    state = (i_n.to(tl.int64) * H + i_h) * K * V
    type = q.dtype.element_ty
    if SAVE:
        spans = tl.cdiv(segment, SPAN)
        _, _, first = locate_sequence(i_n, cu_seqlens, span_offsets, T, spans, BT * SPAN, IS_VARLEN)
        kept += (first * H + i_h) * K * V

    # b_S is Sᵀ [BV, BK]
    if READ:
        b_S = load_transposed(initial + state, o_v, V, V, o_k, K)
    elif VALUES:
        b_S = tl.zeros([BV, BK], tl.float32)
    else:
        b_S = tl.where(o_v[:, None] == o_k[None, :], 1.0, 0.0)
    for i_t in range(tl.cdiv(length, BT)):
        left = length - i_t * BT
        row = (begin + i_t * BT) * H + i_h
        if HAS_ALPHA:
            whole = load_whole(ends + row * 2, left, BT, H)
        b_w = load_tile(w + row * K, o_t, left, H * K, o_k, K)  # [BT, BK]
        b_k = load_tile(k + row * K, o_t, left, H * K, o_k, K)  # [BT, BK]
        if HAS_ALPHA:
            b_start = load_start(ends + row * 2, o_t, left, H)  # [BT]
            b_k = scale_rows(b_k, b_start)
        b_A = load_tile(A + row * BT, o_t, left, H * BT, o_t, BT)  # [BT, BT]
        if SAVE:  # noqa: SIM102 (decided when it is compiled)
            if i_t % SPAN == 0:
                store_tile(kept, b_S, o_v, V, K, o_k, K)
                kept += H * K * V

        # The residuals: three products that wait for each other, all with the left operand at hand.
        S = b_S.to(type)
        b_u = tl.dot(S, tl.trans(b_k), input_precision=PREC)  # Sᵀ kᵀ [BV, BT]
        if VALUES:
            b_v = load_transposed(v + row * V, o_v, V, H * V, o_t, left)  # vᵀ [BV, BT]
            b_u = b_v.to(tl.float32) - b_u
        else:
            b_u = -b_u
        b_e = tl.dot(b_u.to(type), tl.trans(b_A), input_precision=PREC).to(type)  # eᵀ [BV, BT]

        # The reads: off that path.
        if READ:
            b_q = load_tile(q + row * K, o_t, left, H * K, o_k, K)  # [BT, BK]
            b_P = tl.dot(b_w, tl.trans(b_q), input_precision=PREC)  # (q wᵀ)ᵀ [BT, BT]
            if HAS_ALPHA:
                b_D = load_tile(between + row * BT, o_t, left, H * BT, o_t, BT)  # [BT, BT]
                b_P = (b_P * b_D).to(type)
                if SAVE:
                    store_tile(reads + row * BT, b_P, o_t, left, H * BT, o_t, BT)
            else:
                b_P = tl.where(causal, b_P, 0.0).to(type)
        if HAS_ALPHA:
            b_w = scale_rows(b_w, load_end(ends + row * 2, o_t, left, H))
        if READ:
            b_o = tl.dot(S, tl.trans(b_q), input_precision=PREC)  # [BV, BT]
            if HAS_ALPHA:  # not in b_q: what is spilled then costs more than this
                b_o *= b_start[None, :]
            b_o = tl.dot(b_e, b_P, b_o, input_precision=PREC)
        if HAS_ALPHA:
            b_S *= whole
        b_S = tl.dot(b_e, b_w, b_S, input_precision=PREC)  # [BV, BK]
        if READ:
            store_transposed(o + row * V, b_o * scale, o_v, V, H * V, o_t, left)
        if SAVE:
            store_transposed(e + row * V, b_e, o_v, V, H * V, o_t, left)
    store_transposed(final + state, b_S, o_v, V, V, o_k, K)


def memory(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    v: Tensor,
    A: Tensor,
    decay: Decay | None,
    initial_state: Tensor,
    e: Tensor | None,
    kept: Tensor | None,
    reads: Tensor | None,
    chunks: Chunks,
    rule: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, final_state, M); the residuals go into e [B, T, H, V] where it is given, Sᵀ at the start
    of every span into kept [spans, H, V, K], and with a state decay the kernel's reads into reads.

    M [segments, H, K, K]: the map of every segment, of no segments where the walk is not cut.
    """
    o, M = torch.empty_like(v), transitions_like(q, v, chunks.cu_seqlens)
    if not len(M):
        final = torch.empty_like(initial_state)
        _walk(q, k, w, v, A, decay, initial_state, o, e, kept, reads, final, chunks, rule)
        return o, final, M
    H, K, V = initial_state.shape[1:]
    U = torch.empty(len(M), H, K, V, dtype=torch.float32, device=q.device)
    segments = split(chunks, len(M) // chunks.sequences)
    _walk(None, k, w, None, A, decay, M, None, None, None, None, M, segments, rule)
    _walk(None, k, w, v, A, decay, U, None, None, None, None, U, segments, rule)
    starts, final = link(M, U, initial_state, reverse=False)
    _walk(q, k, w, v, A, decay, starts, o, e, kept, reads, U, segments, rule)
    return o, final, M


def transitions_like(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Empty M [segments, H, K, K] float32, as `memory` gives it."""
    (B, T, H, K), V = q.shape, v.shape[-1]
    programs = H * ceil_div(V, launch("memory", q, K, V)["BV"])
    count = 1 if cu_seqlens is not None else count_segments(B, T, programs)
    return q.new_empty(0 if count == 1 else B * count, H, K, K, dtype=torch.float32)


def _walk(
    q: Tensor | None,
    k: Tensor,
    w: Tensor,
    v: Tensor | None,
    A: Tensor,
    decay: Decay | None,
    initial: Tensor,
    o: Tensor | None,
    e: Tensor | None,
    kept: Tensor | None,
    reads: Tensor | None,
    final: Tensor,
    chunks: Chunks,
    rule: Options,
) -> None:
    """Launch the kernel; without v the values are zero, without o nothing is read, initial too."""
    (T, H, K), V = w.shape[1:], final.shape[-1]
    config = launch("memory", w, K, V)
    memory_kernel[(chunks.sequences * H * ceil_div(V, config["BV"]),)](
        w if q is None else q, k, w, w if v is None else v, A,
        *(decay or (A, A)), initial, w if o is None else o,
        w if e is None else e, w if kept is None else kept,
        w if reads is None else reads, final,
        chunks.cu_seqlens, chunks.offsets, chunks.spans.offsets, rule.scale, T, chunks.segment,
        H=H, K=K, V=V, BT=CHUNK, BK=tile(K), SPAN=cutting.SPAN,
        IS_VARLEN=chunks.offsets is not None,
        VALUES=v is not None, READ=o is not None, SAVE=e is not None,
        HAS_ALPHA=decay is not None, PREC=precision(w), **config,
    )  # fmt: skip
