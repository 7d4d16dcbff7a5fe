"""Phase 1 backward without a box: the gradient of the preconditioner's path, in chunks.

With dd = β dw ⊙ k the direct gradient of d, λ_{t+1} = dL/dd_{t+1}, and (I + L)⁻¹, pre, post of
`precond_forward`:

    a = (I + L)⁻ᵀ (b ⊙ r)
    r_t = Σ_{i>t} exp(pre_i − post_t) ⟨dd_i, s_t⟩ + exp(post_C − post_t) ⟨λ_end, s_t⟩
    λ_start = Σ_i exp(pre_i) (dd_i − η b_i a_i s_i) + exp(post_C) λ_end
    λ_{t+1} = Σ_{i>t} exp(pre_i − post_t) (dd_i − η b_i a_i s_i) + exp(post_C − post_t) λ_end

`couple_kernel` makes the sums over dd in parallel, `scan_reverse_kernel` walks the chunks
from the last, and `precond_gradients_kernel` computes λ within every chunk and from it, in
parallel,

    ds_t = η b x λ_{t+1} − η a b d,   dk += β dw ⊙ d + 2 k ⊙ ds,   dlog γ_t = γ ⟨λ_{t+1}, d_t⟩,
    dβ_t = ⟨dw_t, d_t ⊙ k_t⟩ (+ η x ⟨λ_{t+1}, s_t⟩ − η a ⟨d_t, s_t⟩ when beta_aware).

Where d is constant (MOVES off) only dd counts. Float32 but for the dots' operands.
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
    sequence_of,
    store_tile,
    tile,
)
from osdn.ops.triton.config import launch, precision
from osdn.ops.triton.gates import (
    across,
    decay,
    decay_from_start,
    down,
    load_gate,
    load_retention,
)
from osdn.ops.triton.precond_segments import join, transfers


@triton.jit(do_not_specialize=["T"])
def couple_kernel(
    k, beta, log_gamma, dw, r, dd, clipped, cu_seqlens, indices, T,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    HAS_GAMMA: tl.constexpr, IS_VARLEN: tl.constexpr, MOVES: tl.constexpr, BOXED: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """r [B, T, H] without λ_end's part; dd [chunks, H, K], Σ exp(pre_i) dd_i. Grid: chunks · H."""
    i_h = tl.program_id(0) % H
    i_c = tl.program_id(0) // H
    begin, left = locate_chunk(i_c, cu_seqlens, indices, T, BT, IS_VARLEN)
    if left <= 0:
        return
    if BOXED:  # the token scan has done what follows
        i_n = sequence_of(i_c, indices, T, BT, IS_VARLEN)
        if i_c >= tl.load(clipped + i_n * H + i_h):
            return
    o_t = tl.arange(0, BT)
    row = begin * H + i_h
    dd += (i_c.to(tl.int64) * H + i_h) * K
    b_beta = load_gate(beta + row, o_t, left, H)  # [BT]
    pre, post, _ = load_retention(log_gamma + row, o_t, left, (0.0, 0.0), H, HAS_GAMMA)
    # Operands in bfloat16 beside bfloat16 keys, else in float32: k² in float16 could overflow.
    type: tl.constexpr = tl.bfloat16 if k.dtype.element_ty == tl.bfloat16 else tl.float32
    b_G = tl.zeros([BT, BT], tl.float32)  # ⟨dd_i, s_t⟩, rows t and columns i
    for i_k in range(tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        b_k = load_tile(k + row * K, o_t, left, H * K, o_k, K).to(tl.float32)  # [BT, BK]
        b_dd = load_tile(dw + row * K, o_t, left, H * K, o_k, K).to(tl.float32)  # [BT, BK]
        b_dd *= b_beta[:, None] * b_k
        if MOVES:
            b_s = (b_k * b_k).to(type)
            b_G = tl.dot(b_s, tl.trans(b_dd.to(type)), b_G, input_precision=PREC)  # [BT, BT]
        if HAS_GAMMA:
            b_dd *= decay_from_start(pre)[:, None]
        tl.store(dd + o_k, tl.sum(b_dd, 0), mask=o_k < K)  # [BT, BK] over the tokens
    if MOVES:
        if HAS_GAMMA:
            b_G *= decay(across(pre), down(post))
        b_r = tl.sum(tl.where(o_t[None, :] > o_t[:, None], b_G, 0.0), 1)  # over later tokens
        tl.store(r + row + o_t * H, b_r, mask=o_t < left)


@triton.jit(do_not_specialize=["T", "segment"])
def scan_reverse_kernel(
    k, beta, log_gamma, inverse, r, dd, dfinal, a, ends, dinitial, clipped,
    cu_seqlens, offsets, eta, T, segment,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    HAS_GAMMA: tl.constexpr, BETA_AWARE: tl.constexpr, IS_VARLEN: tl.constexpr,
    MOVES: tl.constexpr, BOXED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """a [B, T, H], ends [chunks, H, K] (λ after each chunk), dinitial [N, H, K]. Grid: N · H.

    N counts segments where there are any.
    BOXED: from chunk clipped[n, h] on, the token scan has walked, and dfinal is what it left.
    """
    i_h = tl.program_id(0) % H
    i_n = tl.program_id(0) // H
    begin, length, first = locate_sequence(i_n, cu_seqlens, offsets, T, segment, BT, IS_VARLEN)
    NT = tl.cdiv(length, BT)
    if BOXED:
        i_b = i_n
        if not IS_VARLEN:
            i_b = i_n // tl.cdiv(tl.cdiv(T, BT), segment)
        NT = tl.minimum(NT, tl.load(clipped + i_b * H + i_h) - first.to(tl.int32))
    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    row = (begin + (NT - 1).to(tl.int64) * BT) * H + i_h
    k += row * K
    inverse += row * BT
    beta += row
    log_gamma += row
    r += row
    a += row
    chunk = ((first + NT - 1) * H + i_h) * K
    dd += chunk
    ends += chunk
    state = (i_n.to(tl.int64) * H + i_h) * K

    lam = tl.load(dfinal + state + o_k, mask=m_k, other=0.0)  # [BK]
    for i in tl.range(0, NT, num_stages=STAGES):
        left = length - (NT - 1 - i) * BT
        b_dd = tl.load(dd + o_k, mask=m_k, other=0.0)  # [BK]
        if MOVES:
            b_k = load_tile(k, o_t, left, H * K, o_k, K)  # [BT, BK]
            b_X = load_tile(inverse, o_t, left, H * BT, o_t, BT)  # [BT, BT]
            tl.store(ends + o_k, lam, mask=m_k)
            pre, post, end = load_retention(log_gamma, o_t, left, (0.0, 0.0), H, HAS_GAMMA)
            b_s = b_k.to(tl.float32)
            b_s = b_s * b_s
            b_r = tl.sum(b_s * lam[None, :], 1)  # [BT, BK] over K
            if HAS_GAMMA:
                b_r *= decay(end, post)
            b_r += load_gate(r, o_t, left, H)
            if BETA_AWARE:
                b_b = load_gate(beta, o_t, left, H)
                b_r *= b_b
            # a = (I + L)⁻ᵀ (b ⊙ r), then λ at the chunk's start.
            b_a = tl.sum(b_X * b_r[:, None], 0)  # [BT, BT] over its rows
            tl.store(a + o_t * H, b_a, mask=o_t < left)
            b_y = eta * b_a
            if BETA_AWARE:
                b_y *= b_b
            if HAS_GAMMA:
                b_y *= decay_from_start(pre)
                lam *= decay_from_start(end)
            lam -= tl.sum(b_s * b_y[:, None], 0)  # [BT, BK] over the tokens
        lam += b_dd
        k -= BT * H * K
        inverse -= BT * H * BT
        dd -= H * K
        beta -= BT * H
        log_gamma -= BT * H
        r -= BT * H
        a -= BT * H
        ends -= H * K
    tl.store(dinitial + state + o_k, lam, mask=m_k)


@triton.jit(do_not_specialize=["T"])
def precond_gradients_kernel(
    k, beta, log_gamma, x, a, starts, ends, dw, dk, dbeta, dlog_gamma,
    clipped, cu_seqlens, indices, eta, T,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    HAS_GAMMA: tl.constexpr, BETA_AWARE: tl.constexpr, IS_VARLEN: tl.constexpr,
    MOVES: tl.constexpr, BOXED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Completes dk [B, T, H, K]; writes dbeta and dlog_gamma [B, T, H]. Grid: chunks · H."""
    i_h = tl.program_id(0) % H
    i_c = tl.program_id(0) // H
    begin, left = locate_chunk(i_c, cu_seqlens, indices, T, BT, IS_VARLEN)
    if left <= 0:
        return
    if BOXED:  # the token scan has done what follows
        i_n = sequence_of(i_c, indices, T, BT, IS_VARLEN)
        if i_c >= tl.load(clipped + i_n * H + i_h):
            return
    o_t = tl.arange(0, BT)
    row = begin * H + i_h
    k += row * K
    dw += row * K
    dk += row * K
    chunk = (i_c.to(tl.int64) * H + i_h) * K
    b_beta = load_gate(beta + row, o_t, left, H)  # [BT]
    b_db = tl.zeros([BT], tl.float32)
    if MOVES:
        b_b = tl.full([BT], 1.0, tl.float32)
        if BETA_AWARE:
            b_b = b_beta
        b_x = eta * load_gate(x + row, o_t, left, H)  # [BT]
        b_a = eta * load_gate(a + row, o_t, left, H)  # [BT]
        pre, post, end = load_retention(log_gamma + row, o_t, left, (0.0, 0.0), H, HAS_GAMMA)
        later = o_t[None, :] > o_t[:, None]
        earlier = o_t[None, :] < o_t[:, None]
        # Operands in bfloat16 beside bfloat16 keys, else in float32: float16 could overflow.
        type: tl.constexpr = tl.bfloat16 if k.dtype.element_ty == tl.bfloat16 else tl.float32
        W = tl.where(earlier, decay(down(pre), across(post)), 0.0).to(type)  # [BT, BT]
        Wt = tl.where(later, decay(across(pre), down(post)), 0.0).to(type)  # [BT, BT]
        b_dg = tl.zeros([BT], tl.float32)
        b_ls = tl.zeros([BT], tl.float32)
        b_ds = tl.zeros([BT], tl.float32)
    for i_k in range(tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = o_k < K
        b_k = load_tile(k, o_t, left, H * K, o_k, K).to(tl.float32)  # [BT, BK]
        b_dw = load_tile(dw, o_t, left, H * K, o_k, K).to(tl.float32)  # [BT, BK]
        b_dk = load_tile(dk, o_t, left, H * K, o_k, K).to(tl.float32)  # [BT, BK]
        d = tl.zeros([BT, BK], tl.float32)
        d += tl.load(starts + chunk + o_k, mask=m_k, other=0.0)[None, :]
        if MOVES:
            b_s = b_k * b_k
            lam = tl.zeros([BT, BK], tl.float32)
            lam += tl.load(ends + chunk + o_k, mask=m_k, other=0.0)[None, :]
            if HAS_GAMMA:
                d *= decay_from_start(pre)[:, None]
                lam *= decay(end, post)[:, None]
            z = ((b_b * b_x)[:, None] * b_s).to(type)
            d = tl.dot(W, z, d, input_precision=PREC)  # [BT, BK]
            y = b_beta[:, None] * b_dw * b_k - (b_b * b_a)[:, None] * b_s
            b_y = y.to(type)
            lam = tl.dot(Wt, b_y, lam, input_precision=PREC)  # [BT, BK]
            if type == tl.bfloat16:
                # λ is what is left of terms that cancel, and bfloat16 takes too much of them.
                b_y = (y - b_y.to(tl.float32)).to(type)
                lam = tl.dot(Wt, b_y, lam, input_precision=PREC)
            # From λ and d to the gradients of s and of the gates.
            ds = b_b[:, None] * (b_x[:, None] * lam - b_a[:, None] * d)
            b_dk += 2.0 * b_k * ds
            if HAS_GAMMA:
                b_dg += tl.sum(lam * d, 1)  # [BT, BK] over K, as the three below
            if BETA_AWARE:
                b_ls += tl.sum(lam * b_s, 1)
                b_ds += tl.sum(d * b_s, 1)
        b_dk += b_beta[:, None] * b_dw * d
        b_db += tl.sum(b_dw * d * b_k, 1)
        store_tile(dk, b_dk, o_t, left, H * K, o_k, K)
    if MOVES and BETA_AWARE:
        b_db += b_x * b_ls - b_a * b_ds
    tl.store(dbeta + row + o_t * H, b_db, mask=o_t < left)
    if MOVES and HAS_GAMMA:
        b_dg *= tl.exp(load_gate(log_gamma + row, o_t, left, H))
        tl.store(dlog_gamma + row + o_t * H, b_dg, mask=o_t < left)


def chunk_scan_reverse(
    k: Tensor,
    beta: Tensor,
    log_gamma: Tensor | None,
    x: Tensor,
    starts: Tensor,
    inverse: Tensor,
    M: Tensor,
    dw: Tensor,
    dfinal_precond: Tensor,
    dk: Tensor,
    dbeta: Tensor,
    dlog_gamma: Tensor | None,
    clipped: Tensor,
    chunks: Chunks,
    rule: Options,
) -> Tensor:
    """dinitial_precond; completes dk and fills dβ and dlog γ, before chunk `clipped` with a box."""
    T, H, K = k.shape[1:]
    moves = not rule.constant_precond(log_gamma is not None)
    gate = beta if log_gamma is None else log_gamma
    r, a = (torch.empty_like(beta) for _ in range(2))
    dd, ends = (torch.empty_like(starts) for _ in range(2))
    shape = {"H": H, "K": K, "BT": CHUNK, "HAS_GAMMA": log_gamma is not None, "MOVES": moves}
    shape |= {"IS_VARLEN": chunks.indices is not None, "BOXED": rule.precond_min is not None}

    couple_kernel[(chunks.bound * H,)](
        k, beta, gate, dw, r, dd, clipped, chunks.cu_seqlens, chunks.indices, T,
        **shape, **launch("couple", k, K), PREC=precision(k),
    )  # fmt: skip

    def walk(dfinal: Tensor, chunks: Chunks) -> Tensor:
        dinitial = torch.empty_like(dfinal)
        scan_reverse_kernel[(chunks.sequences * H,)](
            k, beta, gate, inverse, r, dd, dfinal, a, ends, dinitial, clipped,
            chunks.cu_seqlens, chunks.offsets, rule.eta, T, chunks.segment,
            **shape, BK=tile(K), BETA_AWARE=rule.beta_aware, **launch("scan_reverse", k, K),
        )  # fmt: skip
        return dinitial

    if len(M) and rule.precond_min is not None:
        M = transfers(k, beta, log_gamma, inverse, clipped, chunks, rule)
    dinitial = join(walk, M, dfinal_precond, chunks, reverse=True)
    precond_gradients_kernel[(chunks.bound * H,)](
        k, beta, gate, x, a, starts, ends, dw, dk, dbeta,
        dbeta if dlog_gamma is None else dlog_gamma,
        clipped, chunks.cu_seqlens, chunks.indices, rule.eta, T,
        **shape, **launch("precond_gradients", k, K), BETA_AWARE=rule.beta_aware, PREC=precision(k),
    )  # fmt: skip
    return dinitial
