"""One token of a whole OSDN layer between its projections, in one launch.

From a row of projections [q | k | v | b | c | a | g] of each sequence, a program of one sequence
and head makes

    u_c = Σ_j w_{c,j} x_{c,j}            the convolutions of q, k, v; their histories shift by one
    q, k = unit(silu(u)),  v = silu(u)
    β = sigmoid(b) (times 2),  γ = sigmoid(c + bias)
    α = exp(−exp(A_log) softplus(a + dt_bias))   S decays by it before the token
    o, S, d = the online scaled delta step (osdn/ops/triton/step.py)
    y = rmsnorm(o) ⊙ silu(g)

with S, d and the histories updated in place and nothing allocated. Float32 throughout, rounded to
the model's dtype where the layer's own modules would round. Bound by moving S, 4 K V bytes each
way. Grid: B · H. It starts before its projections are complete, as osdn/ops/triton/products.py
explains, and loads S meanwhile.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from osdn.ops.convolution import L2_EPS
from osdn.ops.layer_step import Constants
from osdn.ops.triton.chunks import load_tile, on_device, power_of_two, store_tile, tile
from osdn.ops.triton.gates import clip
from osdn.ops.triton.products import overlap


@triton.jit
def _read_history(history, weight, o_c, m_c, W: tl.constexpr, BW: tl.constexpr):
    """The W−1 inputs before the token [BC, BW], and Σ_j w_{c,j} x_{c,j} over them [BC]."""
    o_w = tl.arange(0, BW)
    m_w = m_c[:, None] & (o_w[None, :] < W - 1)
    b_h = tl.load(history + o_c[:, None] * (W - 1) + o_w[None, :], mask=m_w, other=0.0)
    b_w = tl.load(weight + o_c[:, None] * W + o_w[None, :], mask=m_w, other=0.0)
    return b_h, tl.sum(b_h.to(tl.float32) * b_w.to(tl.float32), 1)


@triton.jit
def _convolve(b_x, past, weight, o_c, m_c, W: tl.constexpr):
    """silu of the convolution at this token [BC], in float32."""
    b_w = tl.load(weight + o_c * W + W - 1, mask=m_c, other=0.0).to(tl.float32)
    u = b_x.to(tl.float32) * b_w + past
    return u * tl.sigmoid(u)


@triton.jit
def _write_history(history, b_h, b_x, o_c, m_c, W: tl.constexpr, BW: tl.constexpr):
    """Shift the inputs by one and append the token's; all threads must have read them before."""
    o_w = tl.arange(0, BW)
    m_w = m_c[:, None] & (o_w[None, :] >= 1) & (o_w[None, :] < W - 1)
    tl.store(history + o_c[:, None] * (W - 1) + o_w[None, :] - 1, b_h, mask=m_w)
    if W > 1:
        tl.store(history + o_c * (W - 1) + W - 2, b_x, mask=m_c)


@triton.jit
def layer_step_kernel(
    p, mask, qk_history, v_history, w_q, w_k, w_v, bias, A_log, dt_bias, norm,
    S, d, o,
    eta, d_min, d_max, scale, norm_eps, L2_EPS,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BW: tl.constexpr,
    HAS_GAMMA: tl.constexpr, HAS_ALPHA: tl.constexpr, HAS_GATE: tl.constexpr,
    NEGATIVE: tl.constexpr, BETA_AWARE: tl.constexpr, BOXED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """p [B, H (2K + V + 1 (+ 1) (+ 1) (+ V))], mask [B] (0 where the token is padding), histories
    [B, 2 H K, W−1] and [B, H V, W−1], w [·, W], S [B, H, K, V], d [B, H, K], o [B, H V].
    """
    if EARLY:
        gdc_launch_dependents()
    dtype = p.dtype.element_ty
    i_h = tl.program_id(0) % H
    i_b = (tl.program_id(0) // H).to(tl.int64)
    GATES: tl.constexpr = 1 + (1 if HAS_GAMMA else 0) + (1 if HAS_ALPHA else 0)
    row = p + i_b * (H * (2 * K + V + GATES + (V if HAS_GATE else 0)))
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    c_k = i_h * K + o_k  # channels of this head

    # What only this kernel writes, and the weights: loaded before the projections are complete.
    h_q = qk_history + i_b * (2 * H * K * (W - 1))
    h_k = h_q + H * K * (W - 1)
    b_hq, past_q = _read_history(h_q, w_q, c_k, m_k, W, BW)  # [BK, BW], [BK]
    b_hk, past_k = _read_history(h_k, w_k, c_k, m_k, W, BW)
    state = (i_b * H + i_h) * K
    b_d = tl.load(d + state + o_k, mask=m_k, other=0.0)
    b_S = load_tile(S + state * V, o_k, K, V, tl.arange(0, BV), V)  # [BK, BV]
    if EARLY:
        gdc_wait()

    there = tl.load(mask + i_b) != 0
    m_there = o_k < tl.where(there, K, 0)  # a padding token's inputs are zero and not kept
    x_q = tl.load(row + c_k, mask=m_there, other=0.0)  # [BK]
    x_k = tl.load(row + H * K + c_k, mask=m_there, other=0.0)
    z_q = _convolve(x_q, past_q, w_q, c_k, m_k, W)
    z_k = _convolve(x_k, past_k, w_k, c_k, m_k, W)
    b_q = (z_q * tl.rsqrt(tl.sum(z_q * z_q, 0) + L2_EPS)).to(dtype).to(tl.float32) * scale
    b_k = (z_k * tl.rsqrt(tl.sum(z_k * z_k, 0) + L2_EPS)).to(dtype).to(tl.float32)

    # Gates. A padding token writes nothing: k, β and log γ are zero, histories stay.
    b_beta = tl.sigmoid(tl.load(row + H * (2 * K + V) + i_h).to(tl.float32))
    if NEGATIVE:
        b_beta *= 2.0
    b_k = tl.where(there, b_k, 0.0)
    b_beta = tl.where(there, b_beta, 0.0)

    b_w = b_beta * b_d * b_k
    b_alpha = 1.0
    if HAS_ALPHA:
        b_a = tl.load(row + H * (2 * K + V + GATES - 1) + i_h).to(tl.float32)
        b_a += tl.load(dt_bias + i_h).to(tl.float32)
        b_dt = tl.maximum(b_a, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(b_a)))  # softplus
        b_alpha = tl.exp(-tl.exp(tl.load(A_log + i_h).to(tl.float32)) * b_dt)
        b_alpha = tl.where(there, b_alpha, 1.0)
    p_g = row + H * (2 * K + V + GATES)
    square = 0.0
    for i_v in tl.static_range((V + BV - 1) // BV):
        o_v = i_v * BV + tl.arange(0, BV)
        m_v = o_v < V
        c_v = i_h * V + o_v
        if i_v > 0:
            b_S = load_tile(S + state * V, o_k, K, V, o_v, V)
        h_v = v_history + i_b * (H * V * (W - 1))
        m_x = o_v < tl.where(there, V, 0)
        x_v = tl.load(row + 2 * H * K + c_v, mask=m_x, other=0.0)  # [BV]
        b_hv, past_v = _read_history(h_v, w_v, c_v, m_v, W, BW)
        b_v = _convolve(x_v, past_v, w_v, c_v, m_v, W).to(dtype).to(tl.float32)
        if HAS_ALPHA:
            b_S *= b_alpha
        b_e = b_v - tl.sum(b_S * b_k[:, None], 0)
        b_S += b_w[:, None] * b_e[None, :]
        b_o = tl.sum(b_S * b_q[:, None], 0).to(dtype).to(tl.float32)  # [BV]
        tl.debug_barrier()  # every thread has read this block's history
        _write_history(h_v, b_hv, x_v, c_v, m_x, W, BW)
        store_tile(S + state * V, b_S, o_k, K, V, o_v, V)
        square += tl.sum(b_o * b_o, 0)
        if V > BV:  # the norm needs all of V: o waits in memory
            tl.store(o + i_b * (H * V) + c_v, b_o.to(dtype), mask=m_v)
    _write_history(h_q, b_hq, x_q, c_k, m_there, W, BW)
    _write_history(h_k, b_hk, x_k, c_k, m_there, W, BW)

    b_s = b_k * b_k
    b_b = 1.0
    if BETA_AWARE:
        b_b = b_beta
    b_x = eta * b_b * (1.0 - b_b * tl.sum(b_d * b_s, 0))
    if HAS_GAMMA:
        b_c = tl.load(row + H * (2 * K + V + 1) + i_h).to(tl.float32)
        b_c += tl.load(bias + i_h).to(tl.float32)
        b_d *= tl.where(there, tl.sigmoid(b_c), 1.0)
    b_d += b_x * b_s
    if BOXED:
        b_d = clip(b_d, d_min, d_max)
    tl.store(d + state + o_k, b_d, mask=m_k)

    # The norm over V and the output gate.
    inverse = tl.rsqrt(square / V + norm_eps)
    for i_v in tl.static_range((V + BV - 1) // BV):
        o_v = i_v * BV + tl.arange(0, BV)
        m_v = o_v < V
        c_v = i_h * V + o_v
        if V > BV:
            tl.debug_barrier()
            b_o = tl.load(o + i_b * (H * V) + c_v, mask=m_v, other=0.0).to(tl.float32)
        b_n = tl.load(norm + o_v, mask=m_v, other=0.0).to(tl.float32)
        b_o = (b_o * inverse * b_n).to(dtype)
        if HAS_GATE:
            b_g = tl.load(p_g + c_v, mask=o_v < tl.where(there, V, 0), other=0.0).to(tl.float32)
            b_g = (b_g * tl.sigmoid(b_g)).to(dtype).to(tl.float32)
            b_o = (b_o.to(tl.float32) * b_g).to(dtype)
        tl.store(o + i_b * (H * V) + c_v, b_o, mask=m_v)


def layer_step(
    projections: Tensor,
    mask: Tensor,
    histories: tuple[Tensor, Tensor],
    convolutions: tuple[Tensor, Tensor, Tensor],
    gamma_bias: Tensor | None,
    decay: tuple[Tensor, Tensor] | None,
    norm: Tensor,
    state: Tensor,
    precond: Tensor,
    out: Tensor,
    constants: Constants,
) -> None:
    """out [B, H V] after this token; histories, state and precond change in place.

    Args:
        projections: [B, N] in the model's dtype, columns q [H K], k [H K], v [H V], b [H], then
            c [H] with a gamma_bias, then a [H] with a decay, then g [H V] with an output gate.
        mask: [B], 0 where the token is padding.
        histories: those of q and k [B, 2 H K, W−1] and of v [B, H V, W−1], as the layer keeps them.
        convolutions: weights of q, k and v, [channels, 1, W].
        gamma_bias: [H], or None without forgetting.  norm: [V], the output norm's weight.
        decay: A_log and dt_bias [H], or None without a decay of the state.
        state [B, H, K, V], precond [B, H, K]: float32. All contiguous.
    """
    c, B, W = constants, len(projections), convolutions[0].shape[-1]
    boxed = c.precond_min is not None
    BK = tile(c.key_size)
    wide = BK * tile(c.value_size) > 128 * 128
    with on_device(projections):
        layer_step_kernel[(B * c.heads,)](
            projections, mask, *histories, *convolutions,
            norm if gamma_bias is None else gamma_bias, *(decay or (norm, norm)), norm,
            state, precond, out, c.eta,
            c.precond_min if boxed else 0.0, c.precond_max if boxed else 0.0, c.scale,
            c.norm_eps, L2_EPS, H=c.heads, K=c.key_size, V=c.value_size, W=W, BK=BK,
            BV=64 if wide else tile(c.value_size), BW=power_of_two(max(W - 1, 1)),
            HAS_GAMMA=gamma_bias is not None, HAS_ALPHA=decay is not None, HAS_GATE=c.output_gate,
            NEGATIVE=c.allow_neg_eigval, BETA_AWARE=c.beta_aware, BOXED=boxed,
            num_warps=8 if wide else 4, **overlap(projections),
        )  # fmt: skip
