"""One token for every sequence: memory and preconditioner updated in place, in one launch.

A program owns one sequence and head: it walks all columns of S in blocks of BV and writes d last,
so that no program reads what another writes. Bound by moving S, 4 K V bytes each way.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from osdn.ops.operands import Options, Token
from osdn.ops.triton.chunks import load_tile, store_tile, tile
from osdn.ops.triton.config import launch
from osdn.ops.triton.gates import clip


@triton.jit
def step_kernel(
    q, k, v, beta, log_gamma, log_alpha, S, d, o, slots, write_slots, stride_S, stride_d,
    eta, d_min, d_max, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_GAMMA: tl.constexpr, HAS_ALPHA: tl.constexpr, BETA_AWARE: tl.constexpr,
    BOXED: tl.constexpr, HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    """q, k [B, H, K], v, o [B, H, V], S [P, H, K, V], d [P, H, K]. Grid: B · H.

    Place p of the pools is at p · stride_S and p · stride_d. Sequence i reads place slots[i] and
    writes place write_slots[i] (both i without HAS_SLOTS); where either is negative, the row is
    empty and nothing is updated.
    """
    i_h = tl.program_id(0) % H
    i_b = tl.program_id(0) // H
    i_r = i_b.to(tl.int64)
    i_w = i_r
    if HAS_SLOTS:
        i_r = tl.load(slots + i_b).to(tl.int64)
        i_w = tl.load(write_slots + i_b).to(tl.int64)
    there = (i_r >= 0) & (i_w >= 0)
    p_S = S + i_h * K * V
    p_d = d + i_h * K
    row = i_b.to(tl.int64) * H + i_h
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    b_q = tl.load(q + row * K + o_k, mask=m_k, other=0.0).to(tl.float32) * scale  # [BK]
    b_k = tl.load(k + row * K + o_k, mask=m_k, other=0.0).to(tl.float32)  # [BK]
    rows = tl.where(there, K, 0)
    b_d = tl.load(p_d + i_r * stride_d + o_k, mask=o_k < rows, other=0.0)  # [BK]
    b_beta = tl.load(beta + row)
    b_w = b_beta * b_d * b_k
    for i_v in range(tl.cdiv(V, BV)):
        o_v = i_v * BV + tl.arange(0, BV)
        m_v = o_v < V
        b_S = load_tile(p_S + i_r * stride_S, o_k, rows, V, o_v, V)  # [BK, BV]
        if HAS_ALPHA:
            b_S *= tl.exp(tl.load(log_alpha + row))
        b_e = tl.load(v + row * V + o_v, mask=m_v, other=0.0).to(tl.float32)  # [BV]
        b_e -= tl.sum(b_S * b_k[:, None], 0)  # [BK, BV] over K
        b_S += b_w[:, None] * b_e[None, :]
        b_o = tl.sum(b_S * b_q[:, None], 0).to(o.dtype.element_ty)  # [BV]
        tl.store(o + row * V + o_v, b_o, mask=m_v)
        store_tile(p_S + i_w * stride_S, b_S, o_k, rows, V, o_v, V)
    b_s = b_k * b_k
    b_b = 1.0
    if BETA_AWARE:
        b_b = b_beta
    b_x = eta * b_b * (1.0 - b_b * tl.sum(b_d * b_s, 0))
    if HAS_GAMMA:
        b_d *= tl.exp(tl.load(log_gamma + row))
    b_d += b_x * b_s
    if BOXED:
        b_d = clip(b_d, d_min, d_max)
    tl.store(p_d + i_w * stride_d + o_k, b_d, mask=o_k < rows)


def decode(token: Token, options: Options) -> Tensor:
    """o [B, H, V]; state and precond are updated in place, see osdn.ops.operands.Token.

    A row whose slot is negative is left empty: nothing is updated and its o is of no use.
    """
    q, k, v, beta, log_gamma, log_alpha, state, precond, slots, write_slots = token
    (B, H, K), V = q.shape, v.shape[-1]
    boxed = options.precond_min is not None
    o = torch.empty_like(v)
    slots = None if slots is None else slots.contiguous()
    write_slots = slots if write_slots is None else write_slots.contiguous()
    step_kernel[(B * H,)](
        q, k, v, beta, log_gamma, log_alpha, state, precond, o, slots, write_slots,
        state.stride(0), precond.stride(0), options.eta,
        options.precond_min if boxed else 0.0, options.precond_max if boxed else 0.0,
        options.scale, H=H, K=K, V=V, BK=tile(K), HAS_GAMMA=log_gamma is not None,
        HAS_ALPHA=log_alpha is not None, BETA_AWARE=options.beta_aware, BOXED=boxed,
        HAS_SLOTS=slots is not None, **launch("step", q, K, V),
    )  # fmt: skip
    return o
