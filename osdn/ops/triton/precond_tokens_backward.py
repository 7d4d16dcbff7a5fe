"""The backward of `precond_tokens`: from a sequence's end to its first chunk where the box clips.

With λ = dL/dd_{t+1}, g = λ where the clip let it through, and dd = β dw ⊙ k:

    a = b ⟨g, s⟩,   λ ← dd + γ g − η b a s

One warp holds λ in registers. Where the clip let it through, `precond_clipped` has written; it also
makes all other gradients, from the sums ⟨g, s⟩ and λ at chunk ends, which are what leaves here.
Before the first clipped chunk `precond_backward` goes on, in chunks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from osdn.ops.operands import Options
from osdn.ops.triton.chunks import CHUNK, Chunks, locate_sequence, tile
from osdn.ops.triton.config import launch
from osdn.ops.triton.precond_tokens import load_log, load_row


@triton.jit
def _load(k, dw, beta, log_gamma, i, left, o_k, H: tl.constexpr, K: tl.constexpr,
          HAS_GAMMA: tl.constexpr):  # fmt: skip
    """k, dw, β and log γ of the token i places on, if so many are left."""
    there = i < left
    return (
        load_row(k + i * (H * K), o_k, there, K),
        load_row(dw + i * (H * K), o_k, there, K),
        tl.load(beta + i * H, mask=there, other=0.0),
        load_log(log_gamma + i * H, there, HAS_GAMMA),
    )


@triton.jit
def _load_inside(inside, left, o_k, K: tl.constexpr, DEPTH: tl.constexpr):
    """The bytes of a round of DEPTH tokens, if any are left."""
    words = ()
    for i in tl.static_range(DEPTH // 8):
        words += (load_row(inside + i * K, o_k, left > 0, K),)
    return words


@triton.jit
def _retreat(p_gs, there, lam, token, inside, eta, HAS_GAMMA: tl.constexpr,
             BETA_AWARE: tl.constexpr):  # fmt: skip
    """One token: writes ⟨g, s⟩, returns dL/dd_t from lam = dL/dd_{t+1}."""
    k, dw, b_beta, b_log = token
    k = k.to(tl.float32)
    s = k * k
    g = tl.where(inside, lam, 0.0)
    gs = tl.sum(g * s, 0)  # [BK] over K
    tl.store(p_gs, gs, mask=there)
    b_z = eta
    if BETA_AWARE:
        b_z *= b_beta * b_beta
    if HAS_GAMMA:
        g *= tl.exp(b_log)
    return (b_beta * k) * dw.to(tl.float32) + g - (b_z * gs) * s


@triton.jit(do_not_specialize=["T"])
def token_scan_reverse_kernel(
    k, beta, log_gamma, dw, inside, dfinal, gs, ends, dinitial, clipped,
    cu_seqlens, offsets, eta, T,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, DEPTH: tl.constexpr,
    HAS_GAMMA: tl.constexpr, BETA_AWARE: tl.constexpr, IS_VARLEN: tl.constexpr,
):  # fmt: skip
    """gs [B, T, H], ⟨g, s⟩; ends [chunks, H, K], λ after each chunk; dinitial [N, H, K].
    Grid: N · H.

    Down to chunk clipped[n, h]: dinitial is λ at that chunk's start, or at the sequence's end.
    inside [chunks, H, BT // 8, K]: bit i of byte j is whether the clip let token 8 j + i through.
    """
    i_h = tl.program_id(0) % H
    i_n = tl.program_id(0) // H
    NT = tl.cdiv(T, BT)
    begin, length, first = locate_sequence(i_n, cu_seqlens, offsets, T, NT, BT, IS_VARLEN)
    skipped = tl.load(clipped + i_n * H + i_h) - first.to(tl.int32)
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    state = (i_n.to(tl.int64) * H + i_h) * K
    PER: tl.constexpr = BT // DEPTH  # rounds of DEPTH tokens in a chunk
    least = skipped * PER
    last = tl.cdiv(length, DEPTH) - 1  # the round to begin with
    row = (begin + last.to(tl.int64) * DEPTH) * H + i_h
    k += row * K
    dw += row * K
    beta += row
    log_gamma += row
    gs += row
    chunk = (first + last // PER) * H + i_h
    ends += chunk * K
    # Of the round's first byte; a byte has K of every 8 tokens, a chunk H times BT // 8 of those.
    inside += (chunk * (BT // 8) + last % PER * (DEPTH // 8)) * K

    lam = tl.load(dfinal + state + o_k, mask=m_k, other=0.0)  # [BK]
    # What one round needs; each is replaced by its token of the round before.
    left = tl.where(last >= least, length - last * DEPTH, 0)
    now = ()
    for i in tl.static_range(DEPTH):
        now += (_load(k, dw, beta, log_gamma, i, left, o_k, H, K, HAS_GAMMA),)
    words = _load_inside(inside, left, o_k, K, DEPTH)
    for i_r in range(last, least - 1, -1):
        if (i_r == last) | (i_r % PER == PER - 1):
            tl.store(ends + o_k, lam, mask=m_k)
            ends -= H * K
        k -= DEPTH * H * K
        dw -= DEPTH * H * K
        beta -= DEPTH * H
        log_gamma -= DEPTH * H
        inside -= tl.where(i_r % PER == 0, (H - 1) * (BT // 8) * K, 0) + DEPTH // 8 * K
        before = tl.where(i_r > least, DEPTH, 0)
        others = _load_inside(inside, before, o_k, K, DEPTH)
        then = ()
        for i in tl.static_range(DEPTH - 1, -1, -1):
            token = now[i]
            then = (_load(k, dw, beta, log_gamma, i, before, o_k, H, K, HAS_GAMMA),) + then
            through = ((words[i // 8].to(tl.int32) >> (i % 8)) & 1) != 0
            lam = _retreat(gs + i * H, i < left, lam, token, through, eta, HAS_GAMMA, BETA_AWARE)
        now = then
        words = others
        gs -= DEPTH * H
        left = before
    tl.store(dinitial + state + o_k, lam, mask=m_k)


def token_scan_reverse(
    k: Tensor,
    beta: Tensor,
    log_gamma: Tensor | None,
    dw: Tensor,
    inside: Tensor,
    dfinal_precond: Tensor,
    gs: Tensor,
    ends: Tensor,
    clipped: Tensor,
    chunks: Chunks,
    rule: Options,
) -> Tensor:
    """λ at the start of chunk `clipped` [N, H, K]; fills gs and ends from there on."""
    T, H, K = k.shape[1:]
    dinitial = torch.empty_like(dfinal_precond)
    token_scan_reverse_kernel[(chunks.sequences * H,)](
        k, beta, beta if log_gamma is None else log_gamma, dw, inside, dfinal_precond,
        gs, ends, dinitial, clipped, chunks.cu_seqlens, chunks.offsets, rule.eta, T,
        H=H, K=K, BT=CHUNK, BK=tile(K), HAS_GAMMA=log_gamma is not None,
        BETA_AWARE=rule.beta_aware, IS_VARLEN=chunks.offsets is not None,
        **launch("token_scan_reverse", k, K),
    )  # fmt: skip
    return dinitial
