"""From the preconditioner to phase 2's operands: write keys and the solve.

With w_t = β_t d_t ⊙ k_t the memory obeys e_t = v_t − S_{t−1}ᵀ k_t, S_t = S_{t−1} + w_t e_tᵀ, so
that in a chunk with start state S

    A = (I + tril(k wᵀ, −1))⁻¹,   e = A (v − k S).

With a state decay α, k wᵀ is taken times exp(G_i − G_j), as `memory_forward` has it.

One program makes a chunk and head's w and A, in two halves of 32 rows. d within the chunk
comes from its start and x, which phase 1 left: with z_j = η b_j x_j s_j and c the d at a
half's start, d_t = exp(pre_t) c + Σ_{j<t} exp(pre_t − post_j) z_j. The solve is in float32.

With a box w is there already (`precond_clipped`), and only the solve is made here.
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
    store_tile,
)
from osdn.ops.triton.config import launch, precision
from osdn.ops.triton.gates import (
    Decay,
    across,
    decay,
    decay_from_start,
    down,
    load_gate,
    load_retention,
    store_ends,
)
from osdn.ops.triton.solve import SCRATCH, invert, mul, store_blocks, store_transposed_blocks


@triton.jit
def _load_rule(beta, log_gamma, x, o_t, left, eta, H: tl.constexpr,
               HAS_GAMMA: tl.constexpr, BETA_AWARE: tl.constexpr, PATH: tl.constexpr):  # fmt: skip
    """Of 32 tokens: β, η b x, pre, post, and post at the end, from the half's start."""
    b_beta = load_gate(beta, o_t, left, H)  # [32]
    b_y = b_beta
    pre, post, end = (b_beta, b_beta), (b_beta, b_beta), (0.0, 0.0)
    if PATH:
        b_y = eta * load_gate(x, o_t, left, H)
        if BETA_AWARE:
            b_y *= b_beta
        pre, post, end = load_retention(log_gamma, o_t, left, (0.0, 0.0), H, HAS_GAMMA)
    return b_beta, b_y, pre, post, end


@triton.jit
def _write_key(p_k, p_w, o_t, left, o_k, c, gates, K: tl.constexpr, H: tl.constexpr,
               HAS_GAMMA: tl.constexpr, PATH: tl.constexpr, STORED: tl.constexpr,
               PREC: tl.constexpr):  # fmt: skip
    """k and w of 32 rows, w written unless it is STORED, and d after them, from c before them."""
    b_beta, b_y, pre, post, end = gates
    k = load_tile(p_k, o_t, left, H * K, o_k, K)  # [32, BK]
    if STORED:
        w = load_tile(p_w, o_t, left, H * K, o_k, K)  # [32, BK]
    else:
        kf = k.to(tl.float32)
        d = tl.zeros(kf.shape, tl.float32) + c[None, :]
        if PATH:
            o_s = tl.arange(0, 32)
            lower = o_s[:, None] > o_s[None, :]
            z = b_y[:, None] * kf * kf  # η b x s [32, BK]
            if HAS_GAMMA:
                W = tl.where(lower, decay(down(pre), across(post)), 0.0)
                d *= decay_from_start(pre)[:, None]
                c = decay_from_start(end) * c + tl.sum(decay(end, post)[:, None] * z, 0)
            else:
                W = tl.where(lower, 1.0, 0.0)
                c += tl.sum(z, 0)  # [32, BK] over the tokens
            d += mul(W, z, PREC)  # [32, 32] [32, BK]
        w = (b_beta[:, None] * d * kf).to(k.dtype)
        store_tile(p_w, w, o_t, left, H * K, o_k, K)
    return k, w, c


@triton.jit
def _lower(D):
    """Zero above the diagonal of [32, 32]."""
    o_s = tl.arange(0, 32)
    return tl.where(o_s[:, None] >= o_s[None, :], D, 0.0)


@triton.jit(do_not_specialize=["T"])
def write_keys_kernel(
    k, beta, log_gamma, log_alpha, x, starts, w, A, between, ends, scratch,
    cu_seqlens, indices, eta, T,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    HAS_GAMMA: tl.constexpr, HAS_ALPHA: tl.constexpr, BETA_AWARE: tl.constexpr,
    IS_VARLEN: tl.constexpr, PATH: tl.constexpr, STORED: tl.constexpr,
    PREC: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """w [B, T, H, K], A [B, T, H, BT], in k's dtype; HAS_ALPHA: between and ends of `Decay`.
    Grid: chunks · H.

    starts [chunks, H, K]: d at each chunk's start; PATH: d moves within it. STORED: w is there.
    """
    i_h = tl.program_id(0) % H
    i_c = tl.program_id(0) // H
    begin, left = locate_chunk(i_c, cu_seqlens, indices, T, BT, IS_VARLEN)
    if left <= 0:
        return
    o_0 = tl.arange(0, 32)
    o_1 = o_0 + 32
    row = begin * H + i_h
    k += row * K
    w += row * K
    beta += row
    log_gamma += row
    x += row
    starts += (i_c.to(tl.int64) * H + i_h) * K
    g0 = _load_rule(beta, log_gamma, x, o_0, left, eta, H, HAS_GAMMA, BETA_AWARE, PATH)
    g1 = _load_rule(beta, log_gamma, x, o_1, left, eta, H, HAS_GAMMA, BETA_AWARE, PATH)

    # k wᵀ, its three blocks on and below the diagonal, a block of features at a time.
    L00 = tl.zeros([32, 32], tl.float32)
    L10, L11 = L00, L00
    for i_k in range(tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        c = tl.load(starts + o_k, mask=o_k < K, other=0.0)  # [BK]
        k0, w0, c = _write_key(k, w, o_0, left, o_k, c, g0, K, H,
                                HAS_GAMMA, PATH, STORED, PREC)  # fmt: skip
        k1, w1, c = _write_key(k, w, o_1, left, o_k, c, g1, K, H,
                                HAS_GAMMA, PATH, STORED, PREC)  # fmt: skip
        L00 += mul(k0, tl.trans(w0), PREC)  # k wᵀ: [32, BK] [BK, 32], as the next two
        L10 += mul(k1, tl.trans(w0), PREC)
        L11 += mul(k1, tl.trans(w1), PREC)

    if HAS_ALPHA:
        # The decay within the chunk: written for phase 2, and k wᵀ times it.
        log_alpha += row
        _, G0, end = load_retention(log_alpha, o_0, left, (0.0, 0.0), H, True)
        _, G1, end = load_retention(log_alpha, o_1, left, end, H, True)
        ends += row * 2
        store_ends(ends, o_0, left, G0, end, H)
        store_ends(ends, o_1, left, G1, end, H)
        D00 = _lower(decay(down(G0), across(G0)))  # [32, 32], as those below
        D10 = decay(down(G1), across(G0))
        D11 = _lower(decay(down(G1), across(G1)))
        L00, L10, L11 = L00 * D00, L10 * D10, L11 * D11
        D = (D00, D10, D11)
        store_transposed_blocks(between + row * BT, H * BT, left, D)
    X = invert(L00, L10, L11, scratch + tl.program_id(0).to(tl.int64) * SCRATCH, SOLVE)
    store_blocks(A + row * BT, H * BT, left, X)


def write_keys(
    k: Tensor,
    beta: Tensor,
    log_gamma: Tensor | None,
    log_alpha: Tensor | None,
    x: Tensor,
    starts: Tensor,
    w: Tensor,
    A: Tensor,
    memory_decay: Decay,
    chunks: Chunks,
    rule: Options,
) -> None:
    """Fill A, with log_alpha memory_decay, and w, which with a box is given."""
    T, H, K = k.shape[1:]
    write_keys_kernel[(chunks.bound * H,)](
        k, beta, beta if log_gamma is None else log_gamma,
        beta if log_alpha is None else log_alpha, x, starts, w, A, *memory_decay,
        A.new_empty(chunks.bound * H * SCRATCH.value, dtype=torch.float32),
        chunks.cu_seqlens, chunks.indices, rule.eta, T,
        H=H, K=K, BT=CHUNK, HAS_GAMMA=log_gamma is not None, HAS_ALPHA=log_alpha is not None,
        BETA_AWARE=rule.beta_aware, IS_VARLEN=chunks.indices is not None,
        PATH=not rule.constant_precond(log_gamma is not None),
        STORED=rule.precond_min is not None,
        PREC=precision(k), SOLVE="tf32x3", **launch("write_keys", k, K),
    )  # fmt: skip
