"""Phase 1 with a box, in chunks: what is elementwise once the token walks have made their sums.

Given x, the path of d within a chunk follows from its start without a sum over the features:

    w_t = β_t d_t ⊙ k_t,   u_t = γ_t d_t + η b_t x_t s_t,   d_{t+1} = clip(u_t).

`clipped_keys_kernel` runs before `token_scan`, to find the first chunk where u leaves the box, and
after it, from that chunk on, with the clip; it then notes where u was inside. Given ⟨g, s⟩ and λ
at the chunk's end from `token_scan_reverse`, with g = λ where u was inside, a = b ⟨g, s⟩ and
dd = β dw ⊙ k, `clipped_gradients_kernel` walks a chunk back:

    dlog γ = γ ⟨g, d⟩           ds = η b x g − η a b d          λ ← dd + γ g − η b a s
    dβ = ⟨dw, d ⊙ k⟩ (+ η x ⟨g, s⟩ − η a ⟨d, s⟩ when beta_aware)      dk += β dw ⊙ d + 2 k ⊙ ds

It needs d from the last token to the first: d at the start of every SUB tokens is made first, and
those between as it comes to them. Each program is one warp that holds whole rows; all in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from osdn.ops.operands import Options
from osdn.ops.triton.chunks import CHUNK, Chunks, locate_chunk, sequence_of, tile
from osdn.ops.triton.config import launch
from osdn.ops.triton.gates import clip
from osdn.ops.triton.precond_tokens import load_gamma, load_rate, load_row, store_row


@triton.jit
def _load_path(k, x, beta, gamma, i, left, o_k, H: tl.constexpr, K: tl.constexpr,
               HAS_GAMMA: tl.constexpr, BETA_AWARE: tl.constexpr):  # fmt: skip
    """k_t, b_t x_t and γ_t of token i of a chunk, zeros past the sequence's end."""
    there = i < left
    b_x = tl.load(x + i * H, mask=there, other=0.0)
    return (
        load_row(k + i * (H * K), o_k, there, K),
        load_rate(beta + i * H, there, BETA_AWARE) * b_x,
        load_gamma(gamma + i * H, there, HAS_GAMMA),
    )


@triton.jit
def _step(d, token, eta):
    """u_t [BK]."""
    k, b_y, b_gamma = token
    k = k.to(tl.float32)
    return b_gamma * d + (eta * b_y) * (k * k)


@triton.jit(do_not_specialize=["T"])
def clipped_keys_kernel(
    k, beta, gamma, x, starts, w, inside, clipped,
    cu_seqlens, indices, eta, d_min, d_max, T,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    HAS_GAMMA: tl.constexpr, BETA_AWARE: tl.constexpr, IS_VARLEN: tl.constexpr,
    CLIP: tl.constexpr,
):  # fmt: skip
    """w [B, T, H, K]. Grid: chunks · H.

    Without CLIP it lowers clipped [N, H] to the number of the first chunk where u leaves the box;
    chunks past that are left out. With CLIP only they are made, and inside [chunks, H, BT // 8, K]:
    bit i of byte j is whether u of token 8 j + i was in the box, 1 past the sequence's end.
    """
    i_h = tl.program_id(0) % H
    i_c = tl.program_id(0) // H
    begin, left = locate_chunk(i_c, cu_seqlens, indices, T, BT, IS_VARLEN)
    if left <= 0:
        return
    clipped += sequence_of(i_c, indices, T, BT, IS_VARLEN) * H + i_h
    first = tl.load(clipped)  # without CLIP other programs may lower it meanwhile
    if CLIP:
        if i_c < first:
            return
    else:
        if i_c > first:
            return
    o_k = tl.arange(0, BK)
    row = begin * H + i_h
    k += row * K
    w += row * K
    beta += row
    gamma += row
    x += row
    chunk = i_c.to(tl.int64) * H + i_h
    inside += chunk * (BT // 8) * K
    d = tl.load(starts + chunk * K + o_k, mask=o_k < K, other=0.0)  # [BK]
    out = tl.zeros([BK], tl.int32)
    for _ in range(BT // 8):
        # The loads of eight tokens, then their arithmetic.
        tokens = ()  # type: tuple
        betas = ()  # type: tuple
        for i in tl.static_range(8):
            tokens += (_load_path(k, x, beta, gamma, i, left, o_k, H, K, HAS_GAMMA, BETA_AWARE),)
            betas += (tl.load(beta + i * H, mask=i < left, other=0.0),)
        word = tl.zeros([BK], tl.int32)
        for i in tl.static_range(8):
            there = i < left
            b_w = betas[i] * d * tokens[i][0].to(tl.float32)
            store_row(w + i * (H * K), b_w, o_k, there, K)
            d = _step(d, tokens[i], eta)
            b_in = (d >= d_min) & (d <= d_max) | (i >= left)
            if CLIP:
                word |= b_in.to(tl.int32) << i
                d = clip(d, d_min, d_max)
            else:
                out = tl.where(b_in, out, 1)
        if CLIP:
            tl.store(inside + o_k, word.to(tl.uint8), mask=o_k < K)
            inside += K
        k += 8 * H * K
        w += 8 * H * K
        beta += 8 * H
        gamma += 8 * H
        x += 8 * H
        left -= 8
    if not CLIP:
        out = tl.where(o_k < K, out, 0)
        tl.atomic_min(clipped, i_c, mask=tl.max(out, 0) > 0)


@triton.jit
def _follow(d, k, x, beta, gamma, left, o_k, eta, d_min, d_max, H: tl.constexpr,
            K: tl.constexpr, SUB: tl.constexpr, HAS_GAMMA: tl.constexpr,
            BETA_AWARE: tl.constexpr):  # fmt: skip
    """d of SUB tokens from the first one's, and d after them."""
    tokens = ()  # type: tuple
    path = ()  # type: tuple
    for i in tl.static_range(SUB):
        tokens += (_load_path(k, x, beta, gamma, i, left, o_k, H, K, HAS_GAMMA, BETA_AWARE),)
    for i in tl.static_range(SUB):
        path += (d,)
        d = clip(_step(d, tokens[i], eta), d_min, d_max)
    return path, d


@triton.jit
def _load_token(k, dw, dk, x, gs, beta, gamma, i, left, o_k, H: tl.constexpr,
                K: tl.constexpr, HAS_GAMMA: tl.constexpr):  # fmt: skip
    """k, dw, phase 2's part of dk, x, ⟨g, s⟩, β and γ of token i, zeros past the end."""
    there = i < left
    at = i * (H * K)
    return (
        load_row(k + at, o_k, there, K),
        load_row(dw + at, o_k, there, K),
        load_row(dk + at, o_k, there, K),
        tl.load(x + i * H, mask=there, other=0.0),
        tl.load(gs + i * H, mask=there, other=0.0),
        tl.load(beta + i * H, mask=there, other=0.0),
        load_gamma(gamma + i * H, there, HAS_GAMMA),
    )


@triton.jit
def _retreat(dk, dbeta, dlog_gamma, there, lam, d, token, inside, eta, o_k, K: tl.constexpr,
             HAS_GAMMA: tl.constexpr, BETA_AWARE: tl.constexpr):  # fmt: skip
    """One token: writes its dk, dβ and dlog γ, returns dL/dd_t from lam = dL/dd_{t+1}."""
    k, dw, b_dk, b_x, b_gs, b_beta, b_gamma = token
    k, dw = k.to(tl.float32), dw.to(tl.float32)
    s = k * k
    g = tl.where(inside, lam, 0.0)
    dwk = dw * k
    b_y, b_z = eta * b_x, eta * b_gs
    db = dwk
    if BETA_AWARE:
        db -= (b_z * b_beta) * s  # of dβ: − η a ⟨d, s⟩
    b_db = tl.sum(db * d, 0)  # [BK] over K
    if BETA_AWARE:
        b_db += b_y * b_gs
        b_y *= b_beta
        b_z *= b_beta * b_beta
    tl.store(dbeta, b_db, mask=there)
    ds = b_y * g - b_z * d
    b_dk = b_dk.to(tl.float32) + (b_beta * d) * dw + 2.0 * k * ds
    store_row(dk, b_dk, o_k, there, K)
    g *= b_gamma
    if HAS_GAMMA:
        tl.store(dlog_gamma, tl.sum(g * d, 0), mask=there)  # [BK] over K
    return b_beta * dwk + g - b_z * s


@triton.jit(do_not_specialize=["T"])
def clipped_gradients_kernel(
    k, beta, gamma, x, starts, inside, dw, gs, ends, dk, dbeta, dlog_gamma, clipped,
    cu_seqlens, indices, eta, d_min, d_max, T,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, SUB: tl.constexpr,
    HAS_GAMMA: tl.constexpr, BETA_AWARE: tl.constexpr, IS_VARLEN: tl.constexpr,
):  # fmt: skip
    """Adds to dk [B, T, H, K]; writes dbeta, dlog_gamma [B, T, H]. Grid: chunks · H.

    Of chunks from clipped[n, h] on; ends [chunks, H, K]: λ after each.
    """
    i_h = tl.program_id(0) % H
    i_c = tl.program_id(0) // H
    begin, left = locate_chunk(i_c, cu_seqlens, indices, T, BT, IS_VARLEN)
    if left <= 0:
        return
    i_n = sequence_of(i_c, indices, T, BT, IS_VARLEN)
    if i_c < tl.load(clipped + i_n * H + i_h):
        return
    o_k = tl.arange(0, BK)
    row = begin * H + i_h
    k += row * K
    dw += row * K
    dk += row * K
    beta += row
    gamma += row
    x += row
    gs += row
    dbeta += row
    dlog_gamma += row
    chunk = i_c.to(tl.int64) * H + i_h
    NS: tl.constexpr = BT // SUB

    # d at the start of each SUB tokens.
    d = tl.load(starts + chunk * K + o_k, mask=o_k < K, other=0.0)  # [BK]
    firsts = (d,)  # type: tuple
    for i_s in tl.static_range(NS - 1):
        t = i_s * SUB
        path, d = _follow(d, k + t * (H * K), x + t * H, beta + t * H, gamma + t * H, left - t,
                       o_k, eta, d_min, d_max, H, K, SUB, HAS_GAMMA, BETA_AWARE)  # fmt: skip
        firsts += (d,)

    t = NS * SUB - SUB
    k += t * (H * K)
    dw += t * (H * K)
    dk += t * (H * K)
    beta += t * H
    gamma += t * H
    x += t * H
    gs += t * H
    dbeta += t * H
    dlog_gamma += t * H
    left -= t
    inside += (chunk * (BT // 8) + (BT - SUB) // 8) * K
    lam = tl.load(ends + chunk * K + o_k, mask=o_k < K, other=0.0)  # [BK]
    for i in range(NS):
        d = firsts[NS - 1]
        for i_s in tl.static_range(1, NS):
            d = tl.where(i == i_s, firsts[NS - 1 - i_s], d)
        path, d = _follow(d, k, x, beta, gamma, left, o_k, eta, d_min, d_max,
                          H, K, SUB, HAS_GAMMA, BETA_AWARE)  # fmt: skip
        words = ()  # type: tuple
        tokens = ()  # type: tuple
        for i_w in tl.static_range(SUB // 8):
            words += (tl.load(inside + i_w * K + o_k, mask=o_k < K, other=0),)
        for j in tl.static_range(SUB):
            tokens += (_load_token(k, dw, dk, x, gs, beta, gamma, j, left, o_k,
                                   H, K, HAS_GAMMA),)  # fmt: skip
        for j in tl.static_range(SUB - 1, -1, -1):
            through = ((words[j // 8].to(tl.int32) >> (j % 8)) & 1) != 0
            lam = _retreat(dk + j * (H * K), dbeta + j * H, dlog_gamma + j * H, j < left, lam,
                           path[j], tokens[j], through, eta, o_k, K,
                           HAS_GAMMA, BETA_AWARE)  # fmt: skip
        k -= SUB * H * K
        dw -= SUB * H * K
        dk -= SUB * H * K
        beta -= SUB * H
        gamma -= SUB * H
        x -= SUB * H
        gs -= SUB * H
        dbeta -= SUB * H
        dlog_gamma -= SUB * H
        inside -= SUB // 8 * K
        left += SUB


def clipped_keys(
    k: Tensor,
    beta: Tensor,
    gamma: Tensor | None,
    x: Tensor,
    starts: Tensor,
    w: Tensor,
    inside: Tensor,
    clipped: Tensor,
    chunks: Chunks,
    rule: Options,
    *,
    found: bool,
) -> None:
    """Fill clipped [N, H] and w before it; if that is found, w and inside from there on."""
    T, H, K = k.shape[1:]
    if not found:
        clipped.fill_(chunks.bound)
    clipped_keys_kernel[(chunks.bound * H,)](
        k, beta, beta if gamma is None else gamma, x, starts, w, inside, clipped,
        chunks.cu_seqlens, chunks.indices, rule.eta, rule.precond_min, rule.precond_max, T,
        H=H, K=K, BT=CHUNK, BK=tile(K), HAS_GAMMA=gamma is not None,
        BETA_AWARE=rule.beta_aware, IS_VARLEN=chunks.indices is not None, CLIP=found,
        **launch("clipped_keys", k, K),
    )  # fmt: skip


def clipped_gradients(
    k: Tensor,
    beta: Tensor,
    gamma: Tensor | None,
    x: Tensor,
    starts: Tensor,
    inside: Tensor,
    dw: Tensor,
    gs: Tensor,
    ends: Tensor,
    dk: Tensor,
    dbeta: Tensor,
    dlog_gamma: Tensor | None,
    clipped: Tensor,
    chunks: Chunks,
    rule: Options,
) -> None:
    """Complete dk and fill dβ and dlog γ, from chunk `clipped` on."""
    T, H, K = k.shape[1:]
    clipped_gradients_kernel[(chunks.bound * H,)](
        k, beta, beta if gamma is None else gamma, x, starts, inside, dw, gs, ends,
        dk, dbeta, dbeta if dlog_gamma is None else dlog_gamma, clipped,
        chunks.cu_seqlens, chunks.indices, rule.eta, rule.precond_min, rule.precond_max, T,
        H=H, K=K, BT=CHUNK, BK=tile(K), HAS_GAMMA=gamma is not None,
        BETA_AWARE=rule.beta_aware, IS_VARLEN=chunks.indices is not None,
        **launch("clipped_gradients", k, K),
    )  # fmt: skip


def inside_like(k: Tensor, chunks: int, boxed: bool) -> Tensor:
    """Empty `inside` of that many chunks, of no size without a box."""
    H, K = k.shape[2:]
    return k.new_empty(chunks if boxed else 0, H, CHUNK // 8, K, dtype=torch.uint8)
