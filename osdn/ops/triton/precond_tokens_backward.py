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
    tokens = ()
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
    return tokens, load_row(inside, o_k, 0 < left, K)


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
    PAIR: tl.constexpr = 2 * BR
    PER: tl.constexpr = BT // PAIR  # pairs of rounds in a chunk
    pairs, least = length // PAIR, skipped * PER
    row = (begin + pairs.to(tl.int64) * PAIR) * H + i_h
    k += row * K
    dw += row * K
    beta += row + unseen_zero(o_k, T)
    gamma += row + unseen_zero(o_k, T)
    gs += row
    chunk = (first + pairs // PER) * H + i_h
    inside += (chunk * (BT // 8) + pairs % PER * 2) * K
    # First what is left after the last pair of rounds.
    left = tl.where(pairs >= least, length % PAIR, 0)
    if length > skipped * BT:
        tl.store(ends + ((first + (length - 1) // BT) * H + i_h) * K + o_k, lam, mask=m_k)
    for i in range(tl.cdiv(left, BR) - 1, -1, -1):
        at = i * (BR * H)
        now, byte = _load_round(k + at * K, dw + at * K, beta + at, gamma + at, inside + i * K,
                                left - i * BR, o_k, H, K, BR, HAS_GAMMA)  # fmt: skip
        lam = _retreat(gs + at, left - i * BR, lam, now, byte, eta, H, BR, BETA_AWARE)

    # Then pairs of rounds; why there are branches, precond_tokens says.
    ends += ((first + (pairs - 1) // PER) * H + i_h) * K
    k -= BR * H * K
    dw -= BR * H * K
    beta -= BR * H
    gamma -= BR * H
    gs -= PAIR * H
    inside -= tl.where(pairs % PER == 0, (H - 1) * (BT // 8) * K, 0) + K
    left = (pairs - least) * PAIR
    now, byte = _load_round(k, dw, beta, gamma, inside, left, o_k, H, K, BR, HAS_GAMMA)
    then, other = now, byte
    for i in range(pairs - 1, least - 1, -1):
        if i % PER == PER - 1:
            tl.store(ends + o_k, lam, mask=m_k)
            ends -= H * K
        k -= BR * H * K
        dw -= BR * H * K
        beta -= BR * H
        gamma -= BR * H
        inside -= K
        if left > BR:
            then, other = _load_round(k, dw, beta, gamma, inside, BR, o_k, H, K, BR, HAS_GAMMA)
        lam = _retreat(gs + BR * H, BR, lam, now, byte, eta, H, BR, BETA_AWARE)
        k -= BR * H * K
        dw -= BR * H * K
        beta -= BR * H
        gamma -= BR * H
        inside -= tl.where(i % PER == 0, (H - 1) * (BT // 8) * K, 0) + K
        if left >= 2 * PAIR:
            now, byte = _load_round(k, dw, beta, gamma, inside, BR, o_k, H, K, BR, HAS_GAMMA)
        lam = _retreat(gs, BR, lam, then, other, eta, H, BR, BETA_AWARE)
        gs -= PAIR * H
        left -= PAIR
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
