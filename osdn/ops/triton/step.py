"""One token for every sequence: memory and preconditioner updated in place, in one launch.

A program owns one sequence and head: it walks all columns of S in blocks of BV and writes d last,
so that no program reads what another writes. Bound by moving S, 4 K V bytes each way.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from osdn.ops.operands import Options
from osdn.ops.triton.chunks import load_tile, store_tile, tile
from osdn.ops.triton.config import launch
from osdn.ops.triton.precond_gates import clip


@triton.jit
def step_kernel(
    q, k, v, beta, log_gamma, S, d, o, slots, eta, d_min, d_max, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_GAMMA: tl.constexpr, BETA_AWARE: tl.constexpr, BOXED: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    """q, k [B, H, K], v, o [B, H, V], S [P, H, K, V], d [P, H, K]. Grid: B · H.

    Sequence i's memory is at slots[i] (i without HAS_SLOTS); a negative slot is a place left empty,
    where nothing is updated.
    """
    i_h = tl.program_id(0) % H
    i_b = tl.program_id(0) // H
    i_s = i_b.to(tl.int64)
    if HAS_SLOTS:
        i_s = tl.load(slots + i_b).to(tl.int64)
    there = i_s >= 0
    state = (i_s * H + i_h) * K
    row = i_b.to(tl.int64) * H + i_h
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    b_q = tl.load(q + row * K + o_k, mask=m_k, other=0.0).to(tl.float32) * scale
    b_k = tl.load(k + row * K + o_k, mask=m_k, other=0.0).to(tl.float32)
    rows = tl.where(there, K, 0)
    b_d = tl.load(d + state + o_k, mask=o_k < rows, other=0.0)
    b_beta = tl.load(beta + row)
    b_w = b_beta * b_d * b_k
    for i_v in range(tl.cdiv(V, BV)):
        o_v = i_v * BV + tl.arange(0, BV)
        m_v = o_v < V
        b_S = load_tile(S + state * V, o_k, rows, V, o_v, V)
        b_e = tl.load(v + row * V + o_v, mask=m_v, other=0.0).to(tl.float32)
        b_e -= tl.sum(b_S * b_k[:, None], 0)
        b_S += b_w[:, None] * b_e[None, :]
        b_o = tl.sum(b_S * b_q[:, None], 0).to(o.dtype.element_ty)
        tl.store(o + row * V + o_v, b_o, mask=m_v)
        store_tile(S + state * V, b_S, o_k, rows, V, o_v, V)
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
    tl.store(d + state + o_k, b_d, mask=o_k < rows)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_gamma: Tensor | None,
    state: Tensor,
    precond: Tensor,
    rule: Options,
    slots: Tensor | None = None,
) -> Tensor:
    """o [B, H, V]; state and precond are updated in place.

    slots: [B] int32 or int64, distinct where not negative: sequence i keeps its memory in
    state[slots[i]] and precond[slots[i]] of a pool [P, H, ...]; a negative one marks an empty
    place, where nothing is updated and o is of no use. None: slot i.
    """
    (B, H, K), V = q.shape, v.shape[-1]
    boxed = rule.precond_min is not None
    o = torch.empty_like(v)
    slots = None if slots is None else slots.contiguous()
    step_kernel[(B * H,)](
        q, k, v, beta, log_gamma, state, precond, o, slots, rule.eta,
        rule.precond_min if boxed else 0.0, rule.precond_max if boxed else 0.0, rule.scale,
        H=H, K=K, V=V, BK=tile(K), HAS_GAMMA=log_gamma is not None,
        BETA_AWARE=rule.beta_aware, BOXED=boxed, HAS_SLOTS=slots is not None,
        **launch("step", q, K, V),
    )  # fmt: skip
    return o
