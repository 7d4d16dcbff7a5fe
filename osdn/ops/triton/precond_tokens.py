"""Phase 1 with a box: token by token, since the clip after each token is part of the rule.

    x_t = 1 − b_t ⟨d_t, s_t⟩,   w_t = β_t d_t ⊙ k_t,   d_{t+1} = clip(γ_t d_t + η b_t x_t s_t).

One warp walks a sequence and head with d in registers, one reduction over the features a token,
four tokens' keys loaded ahead. Backwards, for each chunk from the last: d_t of its tokens is made
again from d at its start and x (elementwise, no reduction) into a scratch of one chunk, and then,
with λ = dL/dd_{t+1}, g = λ where the clip let it through, a = b ⟨g, s⟩ and dd = β dw ⊙ k:

    dlog γ = γ ⟨g, d⟩           ds = η b x g − η a b d          λ ← dd + γ g − η a b s
    dβ = ⟨dw, d ⊙ k⟩ (+ η x ⟨g, s⟩ − η a ⟨d, s⟩ when beta_aware)      dk += β dw ⊙ d + 2 k ⊙ ds
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from osdn.ops.rule import Rule
from osdn.ops.triton.chunks import CHUNK, Chunks, locate_sequence, tile
from osdn.ops.triton.config import launch


@triton.jit
def _load_row(p, t, length, stride, o_k, K: tl.constexpr):
    """Row t (int64) of a [T, H, K] tensor at one head, in float32; zeros past the end."""
    mask = o_k < tl.where(t < length, K, 0)
    return tl.load(p + t * stride + o_k, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_scalar(p, t, length, H: tl.constexpr):
    return tl.load(p + t * H, mask=t < length, other=0.0)


@triton.jit
def _gates(beta, log_gamma, t, length, H: tl.constexpr,
           HAS_GAMMA: tl.constexpr, BETA_AWARE: tl.constexpr):  # fmt: skip
    """β, b and γ of token t."""
    b_beta = _load_scalar(beta, t, length, H)
    b_b = 1.0
    if BETA_AWARE:
        b_b = b_beta
    b_gamma = 1.0
    if HAS_GAMMA:
        b_gamma = tl.exp(_load_scalar(log_gamma, t, length, H))
    return b_beta, b_b, b_gamma


@triton.jit
def _advance(p_w, p_x, t, length, d, k, gates, eta, d_min, d_max, o_k, K: tl.constexpr,
             H: tl.constexpr):  # fmt: skip
    """One token forward: writes w_t and x_t, returns d_{t+1}."""
    b_beta, b_b, b_gamma = gates
    s = k * k
    x = 1.0 - b_b * tl.sum(d * s, 0)
    there = t < length
    w = (b_beta * d * k).to(p_w.dtype.element_ty)
    tl.store(p_w + t * (H * K) + o_k, w, mask=o_k < tl.where(there, K, 0))
    tl.store(p_x + t * H, x, mask=there)
    return _clip(b_gamma * d + (eta * b_b * x) * s, d_min, d_max)


@triton.jit
def _clip(u, d_min, d_max):
    return tl.minimum(tl.maximum(u, d_min), d_max)


@triton.jit(do_not_specialize=["T"])
def token_scan_kernel(
    k, beta, log_gamma, initial, w, x, starts, final, cu_seqlens, offsets, eta, d_min, d_max, T,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    HAS_GAMMA: tl.constexpr, BETA_AWARE: tl.constexpr, IS_VARLEN: tl.constexpr,
):  # fmt: skip
    """w [B, T, H, K], x [B, T, H], starts [chunks, H, K], final [N, H, K]. Grid: N · H."""
    i_h = tl.program_id(0) % H
    i_n = tl.program_id(0) // H
    begin, length, first = locate_sequence(i_n, cu_seqlens, offsets, T, BT, IS_VARLEN)
    o_k = tl.arange(0, BK)
    row = begin * H + i_h
    k += row * K
    w += row * K
    beta += row
    log_gamma += row
    x += row
    starts += (first * H + i_h) * K
    state = (i_n.to(tl.int64) * H + i_h) * K

    d = tl.load(initial + state + o_k, mask=o_k < K, other=0.0)
    zero = begin * 0  # int64, as token numbers times strides must be
    k0 = _load_row(k, zero, length, H * K, o_k, K)
    k1 = _load_row(k, zero + 1, length, H * K, o_k, K)
    k2 = _load_row(k, zero + 2, length, H * K, o_k, K)
    k3 = _load_row(k, zero + 3, length, H * K, o_k, K)
    for i in range(0, length, 4):
        t = zero + i
        g0 = _gates(beta, log_gamma, t, length, H, HAS_GAMMA, BETA_AWARE)
        g1 = _gates(beta, log_gamma, t + 1, length, H, HAS_GAMMA, BETA_AWARE)
        g2 = _gates(beta, log_gamma, t + 2, length, H, HAS_GAMMA, BETA_AWARE)
        g3 = _gates(beta, log_gamma, t + 3, length, H, HAS_GAMMA, BETA_AWARE)
        n0 = _load_row(k, t + 4, length, H * K, o_k, K)
        n1 = _load_row(k, t + 5, length, H * K, o_k, K)
        n2 = _load_row(k, t + 6, length, H * K, o_k, K)
        n3 = _load_row(k, t + 7, length, H * K, o_k, K)
        if i % BT == 0:
            tl.store(starts + t // BT * (H * K) + o_k, d, mask=o_k < K)
        d = _advance(w, x, t, length, d, k0, g0, eta, d_min, d_max, o_k, K, H)
        d = _advance(w, x, t + 1, length, d, k1, g1, eta, d_min, d_max, o_k, K, H)
        d = _advance(w, x, t + 2, length, d, k2, g2, eta, d_min, d_max, o_k, K, H)
        d = _advance(w, x, t + 3, length, d, k3, g3, eta, d_min, d_max, o_k, K, H)
        k0, k1, k2, k3 = n0, n1, n2, n3
    tl.store(final + state + o_k, d, mask=o_k < K)


@triton.jit
def _load_token(k, dw, dk, path, t, last, length, o_k, K: tl.constexpr, H: tl.constexpr,
                BT: tl.constexpr):  # fmt: skip
    """k_t, dw_t, phase 2's part of dk_t, and d_t, for t in the chunk that starts at last."""
    b_k = _load_row(k, t, length, H * K, o_k, K)
    b_dw = _load_row(dw, t, length, H * K, o_k, K)
    b_dk = _load_row(dk, t, length, H * K, o_k, K)
    b_d = _load_row(path, t - last, BT, K, o_k, K)
    return b_k, b_dw, b_dk, b_d


@triton.jit
def _retreat(dk, dbeta, dlog_gamma, t, lam, rows, gates, x, eta, d_min, d_max, o_k,
             K: tl.constexpr, H: tl.constexpr, HAS_GAMMA: tl.constexpr,
             BETA_AWARE: tl.constexpr):  # fmt: skip
    """One token backward: writes its dk, dβ and dlog γ, returns dL/dd_t from lam = dL/dd_{t+1}."""
    b_k, b_dw, b_dk, d = rows
    b_beta, b_b, b_gamma = gates
    s = b_k * b_k
    u = b_gamma * d + (eta * b_b * x) * s
    g = tl.where((u >= d_min) & (u <= d_max), lam, 0.0)
    gs = tl.sum(g * s, 0)
    a = b_b * gs
    db = tl.sum(b_dw * d * b_k, 0)
    if BETA_AWARE:
        db += eta * x * gs - eta * a * tl.sum(d * s, 0)
    ds = (eta * b_b * x) * g - (eta * a * b_b) * d
    b_dk += b_beta * b_dw * d + 2.0 * b_k * ds
    tl.store(dk + t * (H * K) + o_k, b_dk.to(dk.dtype.element_ty), mask=o_k < K)
    tl.store(dbeta + t * H, db)
    if HAS_GAMMA:
        tl.store(dlog_gamma + t * H, b_gamma * tl.sum(g * d, 0))
    return b_beta * b_dw * b_k + b_gamma * g - (eta * b_b * a) * s


@triton.jit(do_not_specialize=["T"])
def token_scan_reverse_kernel(
    k, beta, log_gamma, x, starts, dw, dfinal, path, dk, dbeta, dlog_gamma, dinitial,
    cu_seqlens, offsets, eta, d_min, d_max, T,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    HAS_GAMMA: tl.constexpr, BETA_AWARE: tl.constexpr, IS_VARLEN: tl.constexpr,
):  # fmt: skip
    """Adds to dk; writes dbeta, dlog_gamma [B, T, H], dinitial [N, H, K]. Grid: N · H.

    path [N, H, BT, K] float32 is scratch; each thread reads only what it wrote there itself.
    """
    i_h = tl.program_id(0) % H
    i_n = tl.program_id(0) // H
    begin, length, first = locate_sequence(i_n, cu_seqlens, offsets, T, BT, IS_VARLEN)
    o_k = tl.arange(0, BK)
    row = begin * H + i_h
    k += row * K
    dw += row * K
    dk += row * K
    beta += row
    log_gamma += row
    x += row
    dbeta += row
    dlog_gamma += row
    starts += (first * H + i_h) * K
    state = (i_n.to(tl.int64) * H + i_h) * K
    path += state * BT

    zero = begin * 0  # int64, as token numbers times strides must be
    lam = tl.load(dfinal + state + o_k, mask=o_k < K, other=0.0)
    for i_t in range(tl.cdiv(length, BT) - 1, -1, -1):
        last = zero + i_t * BT
        tokens = tl.minimum(BT, length - i_t * BT)
        d = tl.load(starts + (zero + i_t) * (H * K) + o_k, mask=o_k < K, other=0.0)
        for i in range(tokens):
            _, b_b, b_gamma = _gates(beta, log_gamma, last + i, length, H, HAS_GAMMA, BETA_AWARE)
            b_k = _load_row(k, last + i, length, H * K, o_k, K)
            b_x = _load_scalar(x, last + i, length, H)
            tl.store(path + i * K + o_k, d, mask=o_k < K)
            d = _clip(b_gamma * d + (eta * b_b * b_x) * (b_k * b_k), d_min, d_max)
        t = last + tokens - 1
        rows = _load_token(k, dw, dk, path, t, last, length, o_k, K, H, BT)
        for _ in range(tokens):
            gates = _gates(beta, log_gamma, t, length, H, HAS_GAMMA, BETA_AWARE)
            b_x = _load_scalar(x, t, length, H)
            ahead = tl.maximum(t - 1, last)
            next_rows = _load_token(k, dw, dk, path, ahead, last, length, o_k, K, H, BT)
            lam = _retreat(dk, dbeta, dlog_gamma, t, lam, rows, gates, b_x, eta, d_min, d_max,
                           o_k, K, H, HAS_GAMMA, BETA_AWARE)  # fmt: skip
            rows = next_rows
            t -= 1
    tl.store(dinitial + state + o_k, lam, mask=o_k < K)


def token_scan(
    k: Tensor,
    beta: Tensor,
    log_gamma: Tensor | None,
    initial_precond: Tensor,
    w: Tensor,
    x: Tensor,
    starts: Tensor,
    chunks: Chunks,
    rule: Rule,
) -> Tensor:
    """Fill w [B, T, H, K], x [B, T, H] and starts [chunks, H, K]; return the last d [N, H, K]."""
    T, H, K = k.shape[1:]
    final = torch.empty_like(initial_precond)
    token_scan_kernel[(chunks.sequences * H,)](
        k, beta, beta if log_gamma is None else log_gamma, initial_precond, w, x, starts, final,
        chunks.cu_seqlens, chunks.offsets, rule.eta, rule.precond_min, rule.precond_max, T,
        H=H, K=K, BT=CHUNK, BK=tile(K), HAS_GAMMA=log_gamma is not None,
        BETA_AWARE=rule.beta_aware, IS_VARLEN=chunks.offsets is not None,
        **launch("token_scan", k, K),
    )  # fmt: skip
    return final


def token_scan_reverse(
    k: Tensor,
    beta: Tensor,
    log_gamma: Tensor | None,
    x: Tensor,
    starts: Tensor,
    dw: Tensor,
    dfinal_precond: Tensor,
    dk: Tensor,
    chunks: Chunks,
    rule: Rule,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(dβ, dlog γ, dinitial_precond); completes dk in place."""
    T, H, K = k.shape[1:]
    dbeta, dinitial = torch.empty_like(beta), torch.empty_like(dfinal_precond)
    dlog_gamma = None if log_gamma is None else torch.empty_like(beta)
    path = dinitial.new_empty(chunks.sequences * H, CHUNK, K)
    token_scan_reverse_kernel[(chunks.sequences * H,)](
        k, beta, beta if log_gamma is None else log_gamma, x, starts, dw, dfinal_precond, path,
        dk, dbeta, dbeta if dlog_gamma is None else dlog_gamma, dinitial,
        chunks.cu_seqlens, chunks.offsets, rule.eta, rule.precond_min, rule.precond_max, T,
        H=H, K=K, BT=CHUNK, BK=tile(K), HAS_GAMMA=log_gamma is not None,
        BETA_AWARE=rule.beta_aware, IS_VARLEN=chunks.offsets is not None,
        **launch("token_scan", k, K),
    )  # fmt: skip
    return dbeta, dlog_gamma, dinitial
