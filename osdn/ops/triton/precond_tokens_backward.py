"""The backward of `precond_tokens`: from a sequence's end to its first chunk where the box clips.

For each chunk from the last: d_t of its tokens is made again from d at its start and x
(elementwise, no reduction) into a scratch of one chunk, and then, with λ = dL/dd_{t+1}, g = λ where
the clip let it through, a = b ⟨g, s⟩ and dd = β dw ⊙ k:

    dlog γ = γ ⟨g, d⟩           ds = η b x g − η a b d          λ ← dd + γ g − η a b s
    dβ = ⟨dw, d ⊙ k⟩ (+ η x ⟨g, s⟩ − η a ⟨d, s⟩ when beta_aware)      dk += β dw ⊙ d + 2 k ⊙ ds

`precond_backward` does the rest in chunks. Loads run four tokens ahead.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from osdn.ops.operands import Options
from osdn.ops.triton.chunks import CHUNK, Chunks, locate_sequence, tile
from osdn.ops.triton.config import launch
from osdn.ops.triton.gates import clip
from osdn.ops.triton.precond_tokens import load_gates, load_row, load_scalar


@triton.jit
def _load_path(k, x, beta, log_gamma, t, length, o_k, K: tl.constexpr, H: tl.constexpr,
               HAS_GAMMA: tl.constexpr, BETA_AWARE: tl.constexpr):  # fmt: skip
    """s_t, b_t x_t and γ_t: what moves d, x being known."""
    _, b_b, b_gamma = load_gates(beta, log_gamma, t, length, H, HAS_GAMMA, BETA_AWARE)
    b_k = load_row(k, t, length, H * K, o_k, K)
    return b_k * b_k, b_b * load_scalar(x, t, length, H), b_gamma


@triton.jit
def _follow(path, i, d, move, eta, d_min, d_max, o_k, K: tl.constexpr):
    """Write d_t to row i of path, return d_{t+1}."""
    s, y, b_gamma = move
    tl.store(path + i * K + o_k, d, mask=o_k < K)
    return clip(b_gamma * d + (eta * y) * s, d_min, d_max)


@triton.jit
def _load_backward(k, dw, dk, path, x, beta, log_gamma, t, last, length, o_k, K: tl.constexpr,
                   H: tl.constexpr, BT: tl.constexpr, HAS_GAMMA: tl.constexpr,
                   BETA_AWARE: tl.constexpr):  # fmt: skip
    """k_t, dw_t, phase 2's part of dk_t, d_t, x_t and the gates, of the chunk that starts at last;
    zeros before it.
    """
    rows = tl.where(t >= last, length, t)
    b_k = load_row(k, t, rows, H * K, o_k, K)
    b_dw = load_row(dw, t, rows, H * K, o_k, K)
    b_dk = load_row(dk, t, rows, H * K, o_k, K)
    b_d = load_row(path, t - last, tl.where(t >= last, BT, t - last), K, o_k, K)
    b_x = load_scalar(x, t, rows, H)
    return b_k, b_dw, b_dk, b_d, b_x, load_gates(beta, log_gamma, t, rows, H, HAS_GAMMA, BETA_AWARE)


@triton.jit
def _retreat(dk, dbeta, dlog_gamma, t, length, lam, token, eta, d_min, d_max, o_k,
             K: tl.constexpr, H: tl.constexpr, HAS_GAMMA: tl.constexpr,
             BETA_AWARE: tl.constexpr):  # fmt: skip
    """One token backward: writes its dk, dβ and dlog γ, returns dL/dd_t from lam = dL/dd_{t+1}."""
    b_k, b_dw, b_dk, d, x, gates = token
    b_beta, b_b, b_gamma = gates
    there = t < length
    s = b_k * b_k
    u = b_gamma * d + (eta * b_b * x) * s
    g = tl.where((u >= d_min) & (u <= d_max), lam, 0.0)  # the clip's derivative
    gs = tl.sum(g * s, 0)  # [BK] over K, as the sums below
    a = b_b * gs
    db = tl.sum(b_dw * d * b_k, 0)
    if BETA_AWARE:
        db += eta * x * gs - eta * a * tl.sum(d * s, 0)
    ds = (eta * b_b * x) * g - (eta * a * b_b) * d
    b_dk += b_beta * b_dw * d + 2.0 * b_k * ds
    mask = o_k < tl.where(there, K, 0)
    tl.store(dk + t * (H * K) + o_k, b_dk.to(dk.dtype.element_ty), mask=mask)
    tl.store(dbeta + t * H, db, mask=there)
    if HAS_GAMMA:
        tl.store(dlog_gamma + t * H, b_gamma * tl.sum(g * d, 0), mask=there)
    lam_before = b_beta * b_dw * b_k + b_gamma * g - (eta * b_b * a) * s
    return tl.where(there, lam_before, lam)


@triton.jit(do_not_specialize=["T"])
def token_scan_reverse_kernel(
    k, beta, log_gamma, x, starts, dw, dfinal, path, dk, dbeta, dlog_gamma, dinitial, clipped,
    cu_seqlens, offsets, eta, d_min, d_max, T,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    HAS_GAMMA: tl.constexpr, BETA_AWARE: tl.constexpr, IS_VARLEN: tl.constexpr,
):  # fmt: skip
    """Adds to dk; writes dbeta, dlog_gamma [B, T, H], dinitial [N, H, K]. Grid: N · H.

    Down to chunk clipped[n, h]: dinitial is λ at that chunk's start, or at the sequence's end.
    path [N, H, BT, K] float32 is scratch; each thread reads only what it wrote there itself.
    """
    i_h = tl.program_id(0) % H
    i_n = tl.program_id(0) // H
    NT = tl.cdiv(T, BT)
    begin, length, first = locate_sequence(i_n, cu_seqlens, offsets, T, NT, BT, IS_VARLEN)
    skipped = tl.load(clipped + i_n * H + i_h) - first.to(tl.int32)
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
    lam = tl.load(dfinal + state + o_k, mask=o_k < K, other=0.0)  # [BK]
    for i_t in range(tl.cdiv(length, BT) - 1, skipped - 1, -1):
        last = zero + i_t * BT
        d = tl.load(starts + (zero + i_t) * (H * K) + o_k, mask=o_k < K, other=0.0)  # [BK]
        # Forwards over the chunk: d of every token into path, from x, which is known.
        m0 = _load_path(k, x, beta, log_gamma, last, length, o_k, K, H,
                        HAS_GAMMA, BETA_AWARE)  # fmt: skip
        m1 = _load_path(k, x, beta, log_gamma, last + 1, length, o_k, K, H,
                        HAS_GAMMA, BETA_AWARE)  # fmt: skip
        m2 = _load_path(k, x, beta, log_gamma, last + 2, length, o_k, K, H,
                        HAS_GAMMA, BETA_AWARE)  # fmt: skip
        m3 = _load_path(k, x, beta, log_gamma, last + 3, length, o_k, K, H,
                        HAS_GAMMA, BETA_AWARE)  # fmt: skip
        for i in range(0, BT, 4):
            t = last + i
            n0 = _load_path(k, x, beta, log_gamma, t + 4, length, o_k, K, H,
                            HAS_GAMMA, BETA_AWARE)  # fmt: skip
            n1 = _load_path(k, x, beta, log_gamma, t + 5, length, o_k, K, H,
                            HAS_GAMMA, BETA_AWARE)  # fmt: skip
            n2 = _load_path(k, x, beta, log_gamma, t + 6, length, o_k, K, H,
                            HAS_GAMMA, BETA_AWARE)  # fmt: skip
            n3 = _load_path(k, x, beta, log_gamma, t + 7, length, o_k, K, H,
                            HAS_GAMMA, BETA_AWARE)  # fmt: skip
            d = _follow(path, i, d, m0, eta, d_min, d_max, o_k, K)
            d = _follow(path, i + 1, d, m1, eta, d_min, d_max, o_k, K)
            d = _follow(path, i + 2, d, m2, eta, d_min, d_max, o_k, K)
            d = _follow(path, i + 3, d, m3, eta, d_min, d_max, o_k, K)
            m0, m1, m2, m3 = n0, n1, n2, n3
        # And back over it, four tokens a round, with the loads of the next four on their way.
        t = last + BT - 1
        r0 = _load_backward(k, dw, dk, path, x, beta, log_gamma, t, last, length, o_k,
                            K, H, BT, HAS_GAMMA, BETA_AWARE)  # fmt: skip
        r1 = _load_backward(k, dw, dk, path, x, beta, log_gamma, t - 1, last, length, o_k,
                            K, H, BT, HAS_GAMMA, BETA_AWARE)  # fmt: skip
        r2 = _load_backward(k, dw, dk, path, x, beta, log_gamma, t - 2, last, length, o_k,
                            K, H, BT, HAS_GAMMA, BETA_AWARE)  # fmt: skip
        r3 = _load_backward(k, dw, dk, path, x, beta, log_gamma, t - 3, last, length, o_k,
                            K, H, BT, HAS_GAMMA, BETA_AWARE)  # fmt: skip
        for _ in range(0, BT, 4):
            n0 = _load_backward(k, dw, dk, path, x, beta, log_gamma, t - 4, last, length, o_k,
                                K, H, BT, HAS_GAMMA, BETA_AWARE)  # fmt: skip
            n1 = _load_backward(k, dw, dk, path, x, beta, log_gamma, t - 5, last, length, o_k,
                                K, H, BT, HAS_GAMMA, BETA_AWARE)  # fmt: skip
            n2 = _load_backward(k, dw, dk, path, x, beta, log_gamma, t - 6, last, length, o_k,
                                K, H, BT, HAS_GAMMA, BETA_AWARE)  # fmt: skip
            n3 = _load_backward(k, dw, dk, path, x, beta, log_gamma, t - 7, last, length, o_k,
                                K, H, BT, HAS_GAMMA, BETA_AWARE)  # fmt: skip
            lam = _retreat(dk, dbeta, dlog_gamma, t, length, lam, r0, eta, d_min, d_max,
                           o_k, K, H, HAS_GAMMA, BETA_AWARE)  # fmt: skip
            lam = _retreat(dk, dbeta, dlog_gamma, t - 1, length, lam, r1, eta, d_min, d_max,
                           o_k, K, H, HAS_GAMMA, BETA_AWARE)  # fmt: skip
            lam = _retreat(dk, dbeta, dlog_gamma, t - 2, length, lam, r2, eta, d_min, d_max,
                           o_k, K, H, HAS_GAMMA, BETA_AWARE)  # fmt: skip
            lam = _retreat(dk, dbeta, dlog_gamma, t - 3, length, lam, r3, eta, d_min, d_max,
                           o_k, K, H, HAS_GAMMA, BETA_AWARE)  # fmt: skip
            r0, r1, r2, r3 = n0, n1, n2, n3
            t -= 4
    tl.store(dinitial + state + o_k, lam, mask=o_k < K)


def token_scan_reverse(
    k: Tensor,
    beta: Tensor,
    log_gamma: Tensor | None,
    x: Tensor,
    starts: Tensor,
    dw: Tensor,
    dfinal_precond: Tensor,
    dk: Tensor,
    dbeta: Tensor,
    dlog_gamma: Tensor | None,
    clipped: Tensor,
    chunks: Chunks,
    rule: Options,
) -> Tensor:
    """λ at the start of chunk `clipped`; completes dk and fills dβ and dlog γ from there on."""
    T, H, K = k.shape[1:]
    dinitial = torch.empty_like(dfinal_precond)
    path = dinitial.new_empty(chunks.sequences * H, CHUNK, K)
    token_scan_reverse_kernel[(chunks.sequences * H,)](
        k, beta, beta if log_gamma is None else log_gamma, x, starts, dw, dfinal_precond, path,
        dk, dbeta, dbeta if dlog_gamma is None else dlog_gamma, dinitial, clipped,
        chunks.cu_seqlens, chunks.offsets, rule.eta, rule.precond_min, rule.precond_max, T,
        H=H, K=K, BT=CHUNK, BK=tile(K), HAS_GAMMA=log_gamma is not None,
        BETA_AWARE=rule.beta_aware, IS_VARLEN=chunks.offsets is not None,
        **launch("token_scan", k, K),
    )  # fmt: skip
    return dinitial
