"""Phase 1 where a box clips: token by token, since the clip after each token is part of the rule.

    x_t = 1 − b_t ⟨d_t, s_t⟩,   d_{t+1} = clip(γ_t d_t + η b_t x_t s_t).

A sequence and head is walked from its first chunk with a token that leaves the box
(`precond_clipped` finds it), and not at all where there is none. One warp holds d in registers.
A token takes as long as its chain of dependent instructions, of which the sum over the features is
most. So the walk leaves only x and d at chunk starts, from which `precond_clipped` makes the rest
in parallel, and loads run eight tokens ahead.
"""

import triton
import triton.language as tl
from torch import Tensor

from osdn.ops.operands import Options
from osdn.ops.triton.chunks import CHUNK, Chunks, locate_sequence, tile
from osdn.ops.triton.config import launch
from osdn.ops.triton.gates import clip

ROUND = 8  # tokens whose loads are on their way at once; a byte of `inside` has their bits


@triton.jit
def load_row(p, o_k, there, K: tl.constexpr):
    """A token's K features [BK] at p, in the pointer's dtype; zeros past K, and if not there."""
    return tl.load(p + o_k, mask=o_k < tl.where(there, K, 0), other=0.0)


@triton.jit
def store_row(p, value, o_k, there, K: tl.constexpr):
    """Write a row as `load_row` reads one."""
    tl.store(p + o_k, value.to(p.dtype.element_ty), mask=o_k < tl.where(there, K, 0))


@triton.jit
def unseen_zero(o_k, T):
    """0, which the compiler takes to be another number in each lane.

    Added to the address of a gate, which all lanes load: else it may move the gate to a uniform
    register at once, and wait for the load there.
    """
    return tl.min(o_k.to(tl.float32) * T, 0).to(tl.int32)


@triton.jit
def load_rate(beta, there, BETA_AWARE: tl.constexpr):
    """b of the token at beta."""
    b_b = 1.0
    if BETA_AWARE:
        b_b = tl.load(beta, mask=there, other=0.0)
    return b_b


@triton.jit
def load_gamma(gamma, there, HAS_GAMMA: tl.constexpr):
    """γ of the token at gamma."""
    b_gamma = 1.0
    if HAS_GAMMA:
        b_gamma = tl.load(gamma, mask=there, other=1.0)
    return b_gamma


@triton.jit
def _load_round(k, beta, gamma, left, o_k, H: tl.constexpr, K: tl.constexpr, BR: tl.constexpr,
                HAS_GAMMA: tl.constexpr, BETA_AWARE: tl.constexpr):  # fmt: skip
    """k, b and γ of BR tokens, of which so many are left."""
    tokens = ()  # type: tuple
    for i in tl.static_range(BR):
        there = i < left
        tokens += (
            (
                load_row(k + i * (H * K), o_k, there, K),
                load_rate(beta + i * H, there, BETA_AWARE),
                load_gamma(gamma + i * H, there, HAS_GAMMA),
            ),
        )
    return tokens


@triton.jit
def _advance(x, left, d, tokens, eta, d_min, d_max, H: tl.constexpr, BR: tl.constexpr):
    """BR tokens: writes x_t, returns d after them; those that are not left change nothing."""
    for i in tl.static_range(BR):
        k, b_b, b_gamma = tokens[i]
        s = k.to(tl.float32) * k.to(tl.float32)
        ds = tl.sum(d * s, 0)  # [BK] over K
        tl.store(x + i * H, 1.0 - b_b * ds, mask=i < left)
        # From ds to d in as few steps as there are: η b x without x, then one multiply-add.
        y = eta * b_b - (eta * b_b * b_b) * ds
        d = clip(tl.fma(s, y, b_gamma * d), d_min, d_max)
    return d


@triton.jit(do_not_specialize=["T"])
def token_scan_kernel(
    k, beta, gamma, x, starts, final, clipped,
    cu_seqlens, offsets, eta, d_min, d_max, T,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
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
    beta += row + unseen_zero(o_k, T)
    gamma += row + unseen_zero(o_k, T)
    x += row
    starts += ((first + skipped) * H + i_h) * K
    state = (i_n.to(tl.int64) * H + i_h) * K

    d = tl.load(starts + o_k, mask=m_k, other=0.0)  # [BK]
    # While a round goes, the loads of the next are on their way. The branch, always taken, keeps
    # them before the round: the compiler would put them last, as near as it can to their use.
    now = _load_round(k, beta, gamma, left, o_k, H, K, BR, HAS_GAMMA, BETA_AWARE)
    whole = left // BR
    for i in range(whole):
        if i % (BT // BR) == 0:
            tl.store(starts + o_k, d, mask=m_k)
            starts += H * K
        step = tl.where(left >= 2 * BR, BR * H, 0)  # the last round loads itself once more
        k += step * K
        beta += step
        gamma += step
        then = _load_round(k, beta, gamma, BR, o_k, H, K, BR, HAS_GAMMA, BETA_AWARE)
        if left >= BR:
            d = _advance(x, BR, d, now, eta, d_min, d_max, H, BR)
        now = then
        x += BR * H
        left -= BR
    if left > 0:  # less than a round
        if whole % (BT // BR) == 0:
            tl.store(starts + o_k, d, mask=m_k)
        step = tl.where(whole > 0, BR * H, 0)
        now = _load_round(k + step * K, beta + step, gamma + step, left, o_k, H, K, BR,
                          HAS_GAMMA, BETA_AWARE)  # fmt: skip
        d = _advance(x, left, d, now, eta, d_min, d_max, H, BR)
    tl.store(final + state + o_k, d, mask=m_k)


def token_scan(
    k: Tensor,
    beta: Tensor,
    gamma: Tensor | None,
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
        k, beta, beta if gamma is None else gamma, x, starts, final, clipped,
        chunks.cu_seqlens, chunks.offsets, rule.eta, rule.precond_min, rule.precond_max, T,
        H=H, K=K, BT=CHUNK, BK=tile(K), BR=ROUND, HAS_GAMMA=gamma is not None,
        BETA_AWARE=rule.beta_aware, IS_VARLEN=chunks.offsets is not None,
        **launch("token_scan", k, K),
    )  # fmt: skip
