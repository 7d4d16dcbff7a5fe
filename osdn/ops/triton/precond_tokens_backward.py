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
from osdn.ops.triton.precond_tokens import ROUND, load_gamma, load_row, unseen_zero


@triton.jit
def _load_round(k, dw, beta, gamma, inside, left, o_k, H: tl.constexpr, K: tl.constexpr,
                BR: tl.constexpr, HAS_GAMMA: tl.constexpr):  # fmt: skip
    """k, dw, β and γ of BR tokens, of which so many are left, and their byte of `inside`."""
    tokens = ()  # type: tuple
    for i in tl.static_range(BR):
        there = i < left
        tokens += (
            (
                load_row(k + i * (H * K), o_k, there, K),
                load_row(dw + i * (H * K), o_k, there, K),
                tl.load(beta + i * H, mask=there, other=0.0),
                load_gamma(gamma + i * H, there, HAS_GAMMA),
            ),
        )
    return tokens, load_row(inside, o_k, left > 0, K)


@triton.jit
def _retreat(gs, left, lam, tokens, byte, eta, H: tl.constexpr, BR: tl.constexpr,
             BETA_AWARE: tl.constexpr):  # fmt: skip
    """BR tokens from the last: writes ⟨g, s⟩, returns dL/dd of the first from lam after them."""
    for i in tl.static_range(BR - 1, -1, -1):
        k, dw, b_beta, b_gamma = tokens[i]
        k = k.to(tl.float32)
        s = k * k
        g = tl.where(((byte.to(tl.int32) >> i) & 1) != 0, lam, 0.0)
        b_gs = tl.sum(g * s, 0)  # [BK] over K
        tl.store(gs + i * H, b_gs, mask=i < left)
        b_z = eta
        if BETA_AWARE:
            b_z *= b_beta * b_beta
        lam = tl.fma(s, -b_z * b_gs, (b_beta * k) * dw.to(tl.float32) + b_gamma * g)
    return lam


@triton.jit(do_not_specialize=["T"])
def token_scan_reverse_kernel(
    k, beta, gamma, dw, inside, dfinal, gs, ends, dinitial, clipped,
    cu_seqlens, offsets, eta, T,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
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
    lam = tl.load(dfinal + state + o_k, mask=m_k, other=0.0)  # [BK]
    PER: tl.constexpr = BT // BR  # rounds of BR tokens in a chunk
    whole, least = length // BR, skipped * PER
    row = (begin + whole.to(tl.int64) * BR) * H + i_h
    k += row * K
    dw += row * K
    beta += row + unseen_zero(o_k, T)
    gamma += row + unseen_zero(o_k, T)
    gs += row
    chunk = (first + whole // PER) * H + i_h
    inside += (chunk * PER + whole % PER) * K
    if length > skipped * BT:
        tl.store(ends + ((first + (length - 1) // BT) * H + i_h) * K + o_k, lam, mask=m_k)
    left = length - whole * BR
    if (left > 0) & (whole >= least):  # less than a round
        now, byte = _load_round(k, dw, beta, gamma, inside, left, o_k, H, K, BR, HAS_GAMMA)
        lam = _retreat(gs, left, lam, now, byte, eta, H, BR, BETA_AWARE)

    # Then whole rounds; why one loads before a branch, precond_tokens says.
    k -= BR * H * K
    dw -= BR * H * K
    beta -= BR * H
    gamma -= BR * H
    gs -= BR * H
    inside -= tl.where(whole % PER == 0, (H - 1) * PER * K, 0) + K
    ends += ((first + whole // PER - 1) * H + i_h) * K  # of the last whole chunk
    left = (whole - least) * BR
    now, byte = _load_round(k, dw, beta, gamma, inside, left, o_k, H, K, BR, HAS_GAMMA)
    for i in range(whole - 1, least - 1, -1):
        if i % PER == PER - 1:
            tl.store(ends + o_k, lam, mask=m_k)
            ends -= H * K
        step = tl.where(left >= 2 * BR, BR * H, 0)
        k -= step * K
        dw -= step * K
        beta -= step
        gamma -= step
        step = tl.where(i % PER == 0, (H - 1) * PER * K, 0) + K
        inside -= tl.where(left >= 2 * BR, step, 0)
        then, other = _load_round(k, dw, beta, gamma, inside, BR, o_k, H, K, BR, HAS_GAMMA)
        if left >= BR:
            lam = _retreat(gs, BR, lam, now, byte, eta, H, BR, BETA_AWARE)
        now = then
        byte = other
        gs -= BR * H
        left -= BR
    tl.store(dinitial + state + o_k, lam, mask=m_k)


def token_scan_reverse(
    k: Tensor,
    beta: Tensor,
    gamma: Tensor | None,
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
        k, beta, beta if gamma is None else gamma, dw, inside, dfinal_precond,
        gs, ends, dinitial, clipped, chunks.cu_seqlens, chunks.offsets, rule.eta, T,
        H=H, K=K, BT=CHUNK, BK=tile(K), BR=ROUND, HAS_GAMMA=gamma is not None,
        BETA_AWARE=rule.beta_aware, IS_VARLEN=chunks.offsets is not None,
        **launch("token_scan_reverse", k, K),
    )  # fmt: skip
    return dinitial
