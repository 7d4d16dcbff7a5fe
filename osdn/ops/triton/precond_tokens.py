"""Phase 1 where a box clips: token by token, since the clip after each token is part of the rule.

    x_t = 1 − b_t ⟨d_t, s_t⟩,   d_{t+1} = clip(γ_t d_t + η b_t x_t s_t).

A sequence and head is walked from its first chunk with a token that leaves the box
(`precond_clipped` finds it), and not at all where there is none. One warp holds d in registers.
A token takes as long as its chain of dependent instructions, of which the sum over the features is
most. So the walk leaves only x and d at chunk starts, from which `precond_clipped` makes the rest in
parallel, and loads run DEPTH tokens ahead.
"""

import triton
import triton.language as tl
from torch import Tensor

from osdn.ops.operands import Options
from osdn.ops.triton.chunks import CHUNK, Chunks, locate_sequence, tile
from osdn.ops.triton.config import launch
from osdn.ops.triton.gates import clip


@triton.jit
def load_row(p, o_k, there, K: tl.constexpr):
    """A token's K features [BK] at p, in the pointer's dtype; zeros past K, and if not there."""
    return tl.load(p + o_k, mask=o_k < tl.where(there, K, 0), other=0.0)


@triton.jit
def store_row(p, value, o_k, there, K: tl.constexpr):
    """Write a row as `load_row` reads one."""
    tl.store(p + o_k, value.to(p.dtype.element_ty), mask=o_k < tl.where(there, K, 0))


@triton.jit
def load_rate(beta, there, BETA_AWARE: tl.constexpr):
    """b of the token at beta."""
    b_b = 1.0
    if BETA_AWARE:
        b_b = tl.load(beta, mask=there, other=0.0)
    return b_b


@triton.jit
def load_log(log_gamma, there, HAS_GAMMA: tl.constexpr):
    """log γ of the token at log_gamma."""
    b_log = 0.0
    if HAS_GAMMA:
        b_log = tl.load(log_gamma, mask=there, other=0.0)
    return b_log


@triton.jit
def _load(k, beta, log_gamma, i, left, o_k, H: tl.constexpr, K: tl.constexpr,
          HAS_GAMMA: tl.constexpr, BETA_AWARE: tl.constexpr):  # fmt: skip
    """k, b and log γ of the token i places on, if so many are left."""
    there = i < left
    return (
        load_row(k + i * (H * K), o_k, there, K),
        load_rate(beta + i * H, there, BETA_AWARE),
        load_log(log_gamma + i * H, there, HAS_GAMMA),
    )


@triton.jit
def _advance(p_x, there, d, token, eta, d_min, d_max, HAS_GAMMA: tl.constexpr):
    """One token: writes x_t, returns d_{t+1}, which is d_t if it is not there."""
    k, b_b, b_log = token
    s = k.to(tl.float32) * k.to(tl.float32)
    ds = tl.sum(d * s, 0)  # [BK] over K
    tl.store(p_x, 1.0 - b_b * ds, mask=there)
    y = eta * b_b - (eta * b_b * b_b) * ds  # η b x, one step sooner than from x
    if HAS_GAMMA:
        d *= tl.exp(b_log)
    return clip(d + y * s, d_min, d_max)


@triton.jit(do_not_specialize=["T"])
def token_scan_kernel(
    k, beta, log_gamma, x, starts, final, clipped,
    cu_seqlens, offsets, eta, d_min, d_max, T,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, DEPTH: tl.constexpr,
    HAS_GAMMA: tl.constexpr, BETA_AWARE: tl.constexpr, IS_VARLEN: tl.constexpr,
):  # fmt: skip
    """x [B, T, H], starts [chunks, H, K], final [N, H, K]. Grid: N · H.

    From chunk clipped[n, h] on, whose start is right already.
    """
    i_h = tl.program_id(0) % H
    i_n = tl.program_id(0) // H
    NT = tl.cdiv(T, BT)
    begin, length, first = locate_sequence(i_n, cu_seqlens, offsets, T, NT, BT, IS_VARLEN)
    skipped = tl.load(clipped + i_n * H + i_h) - first.to(tl.int32)
    left = length - skipped * BT
    if left <= 0:
        return
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    row = (begin + skipped.to(tl.int64) * BT) * H + i_h
    k += row * K
    beta += row
    log_gamma += row
    x += row
    starts += ((first + skipped) * H + i_h) * K
    state = (i_n.to(tl.int64) * H + i_h) * K

    d = tl.load(starts + o_k, mask=m_k, other=0.0)  # [BK]
    # What one round of DEPTH tokens needs; each is replaced by its token of the next round.
    now = ()
    for i in tl.static_range(DEPTH):
        now += (_load(k, beta, log_gamma, i, left, o_k, H, K, HAS_GAMMA, BETA_AWARE),)
    for i_r in range(tl.cdiv(left, DEPTH)):
        if i_r % (BT // DEPTH) == 0:
            tl.store(starts + o_k, d, mask=m_k)
            starts += H * K
        then = ()
        for i in tl.static_range(DEPTH):
            token = now[i]
            then += (
                _load(k, beta, log_gamma, i + DEPTH, left, o_k, H, K, HAS_GAMMA, BETA_AWARE),
            )
            d = _advance(x + i * H, i < left, d, token, eta, d_min, d_max, HAS_GAMMA)
        now = then
        k += DEPTH * H * K
        beta += DEPTH * H
        log_gamma += DEPTH * H
        x += DEPTH * H
        left -= DEPTH
    tl.store(final + state + o_k, d, mask=m_k)


def token_scan(
    k: Tensor,
    beta: Tensor,
    log_gamma: Tensor | None,
    x: Tensor,
    starts: Tensor,
    final: Tensor,
    clipped: Tensor,
    chunks: Chunks,
    rule: Options,
) -> None:
    """Put x [B, T, H], starts [chunks, H, K] and the last d [N, H, K] right."""
    T, H, K = k.shape[1:]
    token_scan_kernel[(chunks.sequences * H,)](
        k, beta, beta if log_gamma is None else log_gamma, x, starts, final, clipped,
        chunks.cu_seqlens, chunks.offsets, rule.eta, rule.precond_min, rule.precond_max, T,
        H=H, K=K, BT=CHUNK, BK=tile(K), HAS_GAMMA=log_gamma is not None,
        BETA_AWARE=rule.beta_aware, IS_VARLEN=chunks.offsets is not None,
        **launch("token_scan", k, K),
    )  # fmt: skip
