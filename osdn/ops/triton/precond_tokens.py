"""Phase 1 where a box clips: token by token, since the clip after each token is part of the rule.

    x_t = 1 − b_t ⟨d_t, s_t⟩,   w_t = β_t d_t ⊙ k_t,   d_{t+1} = clip(γ_t d_t + η b_t x_t s_t).

A sequence and head is walked from its first chunk with a token that leaves the box (`write_keys`
finds it), and not at all where there is none. One warp holds d in registers, one reduction over the
features a token; what four tokens need is loaded while the four before them are worked on.
"""

import triton
import triton.language as tl
from torch import Tensor

from osdn.ops.operands import Options
from osdn.ops.triton.chunks import CHUNK, Chunks, locate_sequence, tile
from osdn.ops.triton.config import launch
from osdn.ops.triton.gates import clip


@triton.jit
def load_row(p, t, length, stride, o_k, K: tl.constexpr):
    """Row t (int64) of a [T, H, K] tensor at one head, in float32; zeros past the end."""
    mask = o_k < tl.where(t < length, K, 0)
    return tl.load(p + t * stride + o_k, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_scalar(p, t, length, H: tl.constexpr):
    return tl.load(p + t * H, mask=t < length, other=0.0)


@triton.jit
def load_gates(beta, log_gamma, t, length, H: tl.constexpr,
           HAS_GAMMA: tl.constexpr, BETA_AWARE: tl.constexpr):  # fmt: skip
    """β, b and γ of token t."""
    b_beta = load_scalar(beta, t, length, H)
    b_b = 1.0
    if BETA_AWARE:
        b_b = b_beta
    b_gamma = 1.0
    if HAS_GAMMA:
        b_gamma = tl.exp(load_scalar(log_gamma, t, length, H))
    return b_beta, b_b, b_gamma


@triton.jit
def _advance(p_w, p_x, t, length, d, k, gates, eta, d_min, d_max, o_k, K: tl.constexpr,
             H: tl.constexpr):  # fmt: skip
    """One token forward: writes w_t and x_t, returns d_{t+1}."""
    b_beta, b_b, b_gamma = gates
    s = k * k
    x = 1.0 - b_b * tl.sum(d * s, 0)  # [BK] over K
    there = t < length
    w = (b_beta * d * k).to(p_w.dtype.element_ty)
    tl.store(p_w + t * (H * K) + o_k, w, mask=o_k < tl.where(there, K, 0))
    tl.store(p_x + t * H, x, mask=there)
    return clip(b_gamma * d + (eta * b_b * x) * s, d_min, d_max)


@triton.jit
def _load_forward(k, beta, log_gamma, t, length, o_k, K: tl.constexpr, H: tl.constexpr,
                  HAS_GAMMA: tl.constexpr, BETA_AWARE: tl.constexpr):  # fmt: skip
    """k_t and the gates of token t."""
    gates = load_gates(beta, log_gamma, t, length, H, HAS_GAMMA, BETA_AWARE)
    return load_row(k, t, length, H * K, o_k, K), gates


@triton.jit(do_not_specialize=["T"])
def token_scan_kernel(
    k, beta, log_gamma, w, x, starts, final, clipped,
    cu_seqlens, offsets, eta, d_min, d_max, T,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    HAS_GAMMA: tl.constexpr, BETA_AWARE: tl.constexpr, IS_VARLEN: tl.constexpr,
):  # fmt: skip
    """w [B, T, H, K], x [B, T, H], starts [chunks, H, K], final [N, H, K]. Grid: N · H.

    From chunk clipped[n, h] on, whose start is right already.
    """
    i_h = tl.program_id(0) % H
    i_n = tl.program_id(0) // H
    NT = tl.cdiv(T, BT)
    begin, length, first = locate_sequence(i_n, cu_seqlens, offsets, T, NT, BT, IS_VARLEN)
    skipped = tl.load(clipped + i_n * H + i_h) - first.to(tl.int32)
    if skipped >= tl.cdiv(length, BT):
        return
    o_k = tl.arange(0, BK)
    row = begin * H + i_h
    k += row * K
    w += row * K
    beta += row
    log_gamma += row
    x += row
    starts += (first * H + i_h) * K
    state = (i_n.to(tl.int64) * H + i_h) * K

    t = begin * 0 + skipped * BT  # int64, as token numbers times strides must be
    d = tl.load(starts + t // BT * (H * K) + o_k, mask=o_k < K, other=0.0)  # [BK]
    # Four tokens a round: while these go, the loads of the next four are on their way.
    k0, g0 = _load_forward(k, beta, log_gamma, t, length, o_k, K, H, HAS_GAMMA, BETA_AWARE)
    k1, g1 = _load_forward(k, beta, log_gamma, t + 1, length, o_k, K, H, HAS_GAMMA, BETA_AWARE)
    k2, g2 = _load_forward(k, beta, log_gamma, t + 2, length, o_k, K, H, HAS_GAMMA, BETA_AWARE)
    k3, g3 = _load_forward(k, beta, log_gamma, t + 3, length, o_k, K, H, HAS_GAMMA, BETA_AWARE)
    for i in range(skipped * BT, length, 4):
        n0, h0 = _load_forward(k, beta, log_gamma, t + 4, length, o_k, K, H, HAS_GAMMA, BETA_AWARE)
        n1, h1 = _load_forward(k, beta, log_gamma, t + 5, length, o_k, K, H, HAS_GAMMA, BETA_AWARE)
        n2, h2 = _load_forward(k, beta, log_gamma, t + 6, length, o_k, K, H, HAS_GAMMA, BETA_AWARE)
        n3, h3 = _load_forward(k, beta, log_gamma, t + 7, length, o_k, K, H, HAS_GAMMA, BETA_AWARE)
        if i % BT == 0:
            tl.store(starts + t // BT * (H * K) + o_k, d, mask=o_k < K)
        d = _advance(w, x, t, length, d, k0, g0, eta, d_min, d_max, o_k, K, H)
        d = _advance(w, x, t + 1, length, d, k1, g1, eta, d_min, d_max, o_k, K, H)
        d = _advance(w, x, t + 2, length, d, k2, g2, eta, d_min, d_max, o_k, K, H)
        d = _advance(w, x, t + 3, length, d, k3, g3, eta, d_min, d_max, o_k, K, H)
        k0, k1, k2, k3 = n0, n1, n2, n3
        g0, g1, g2, g3 = h0, h1, h2, h3
        t += 4
    tl.store(final + state + o_k, d, mask=o_k < K)


def token_scan(
    k: Tensor,
    beta: Tensor,
    log_gamma: Tensor | None,
    w: Tensor,
    x: Tensor,
    starts: Tensor,
    final: Tensor,
    clipped: Tensor,
    chunks: Chunks,
    rule: Options,
) -> None:
    """Put w [B, T, H, K], x [B, T, H], starts [chunks, H, K] and the last d [N, H, K] right."""
    T, H, K = k.shape[1:]
    token_scan_kernel[(chunks.sequences * H,)](
        k, beta, beta if log_gamma is None else log_gamma, w, x, starts, final, clipped,
        chunks.cu_seqlens, chunks.offsets, rule.eta, rule.precond_min, rule.precond_max, T,
        H=H, K=K, BT=CHUNK, BK=tile(K), HAS_GAMMA=log_gamma is not None,
        BETA_AWARE=rule.beta_aware, IS_VARLEN=chunks.offsets is not None,
        **launch("token_scan", k, K),
    )  # fmt: skip
