"""The matrix products of a decoding step, with the norm before them and the addition after them.

A step multiplies each weight by B rows only, so it costs one pass over the weights. Each kernel
reads its weight once and does its neighbours' elementwise work on the way:

    project        y = rmsnorm(x) [W_0; W_1; …]ᵀ       one launch for up to six weights of one input
    gated_product  y = silu(n W_gateᵀ) ⊙ (n W_upᵀ)     n = rmsnorm(x), the first half of a SwiGLU
    add_product    h ← h + x Wᵀ                        a residual connection, in place

Grid: (blocks of BN outputs, blocks of BM rows). Weights stay where they are, so a captured launch
sees a change of their values. Sums are float32; results are rounded where a module would round
them. The norm's factor 1/rms is one number a row, so it multiplies the finished sums: one pass.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from osdn.ops.triton.chunks import on_device
from osdn.ops.triton.config import precision

MOST_WEIGHTS = 6  # of one launch of `project`


@triton.jit
def _rows(x, gain, square, o_m, o_k, B, D: tl.constexpr, NORM: tl.constexpr):
    """(x ⊙ gain in x's dtype [BM, BK], Σ x² so far [BM]); x as it is without NORM."""
    mask = (o_m[:, None] < B) & (o_k[None, :] < D)
    b_x = tl.load(x + o_m.to(tl.int64)[:, None] * D + o_k[None, :], mask=mask, other=0.0)
    if NORM:
        b_wide = b_x.to(tl.float32)
        square += tl.sum(b_wide * b_wide, 1)
        b_gain = tl.load(gain + o_k, mask=o_k < D, other=0.0).to(tl.float32)  # [BK]
        b_x = (b_wide * b_gain[None, :]).to(b_x.dtype)
    return b_x, square


@triton.jit
def _add(b_y, b_x, w, o_n, N, o_k, D: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr):
    """b_y + x wᵀ over these BK inputs [BM, BN]; for one row, the products themselves [BN, BK]."""
    mask = (o_n[:, None] < N) & (o_k[None, :] < D)
    b_w = tl.load(w + o_n.to(tl.int64)[:, None] * D + o_k[None, :], mask=mask, other=0.0)
    if BM == 1:
        b_y += b_w.to(tl.float32) * b_x.to(tl.float32)
    else:
        b_y = tl.dot(b_x, tl.trans(b_w), b_y, input_precision=PRECISION)
    return b_y


@triton.jit
def _zeros(BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    if BM == 1:  # the matrix unit has nothing to share: sum elementwise, reduce once at the end
        b_y = tl.zeros([BN, BK], tl.float32)
    else:
        b_y = tl.zeros([BM, BN], tl.float32)
    return b_y


@triton.jit
def _finished(b_y, square, eps, D: tl.constexpr, BM: tl.constexpr, NORM: tl.constexpr):
    """[BM, BN] in float32."""
    if BM == 1:
        b_y = tl.sum(b_y, 1)[None, :]
    if NORM:
        b_y *= tl.rsqrt(square / D + eps)[:, None]
    return b_y


@triton.jit(do_not_specialize=["B"])
def project_kernel(
    x, gain, w_0, w_1, w_2, w_3, w_4, w_5, y, B, eps, D: tl.constexpr,
    N_0: tl.constexpr, N_1: tl.constexpr, N_2: tl.constexpr, N_3: tl.constexpr,
    N_4: tl.constexpr, N_5: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x [B, D], w_i [N_i, D], y [B, Σ N_i]. A program's outputs are of one weight."""
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    i_n = tl.program_id(0)  # the block's number within its weight, in the end
    w, N, column = w_0, i_n * 0 + N_0, i_n * 0
    if i_n >= (N_0 + BN - 1) // BN:
        w, N, column, i_n = w_1, N_1, column + N_0, i_n - (N_0 + BN - 1) // BN
        if i_n >= (N_1 + BN - 1) // BN:
            w, N, column, i_n = w_2, N_2, column + N_1, i_n - (N_1 + BN - 1) // BN
            if i_n >= (N_2 + BN - 1) // BN:
                w, N, column, i_n = w_3, N_3, column + N_2, i_n - (N_2 + BN - 1) // BN
                if i_n >= (N_3 + BN - 1) // BN:
                    w, N, column, i_n = w_4, N_4, column + N_3, i_n - (N_3 + BN - 1) // BN
                    if i_n >= (N_4 + BN - 1) // BN:
                        w, N, column, i_n = w_5, N_5, column + N_4, i_n - (N_4 + BN - 1) // BN
    o_n = i_n * BN + tl.arange(0, BN)
    square = tl.zeros([BM], tl.float32)
    b_y = _zeros(BM, BN, BK)
    for i_k in range((D + BK - 1) // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        b_x, square = _rows(x, gain, square, o_m, o_k, B, D, True)
        b_y = _add(b_y, b_x, w, o_n, N, o_k, D, BM, PRECISION)
    b_y = _finished(b_y, square, eps, D, BM, True)
    p_y = y + o_m.to(tl.int64)[:, None] * (N_0 + N_1 + N_2 + N_3 + N_4 + N_5) + column
    mask = (o_m[:, None] < B) & (o_n[None, :] < N)
    tl.store(p_y + o_n[None, :], b_y.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["B"])
def gated_kernel(
    x, gain, w_gate, w_up, y, B, eps, D: tl.constexpr, N: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x [B, D], both weights [N, D], y [B, N]."""
    dtype = y.dtype.element_ty
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    square = tl.zeros([BM], tl.float32)
    b_gate, b_up = _zeros(BM, BN, BK), _zeros(BM, BN, BK)
    for i_k in range((D + BK - 1) // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        b_x, square = _rows(x, gain, square, o_m, o_k, B, D, True)
        b_gate = _add(b_gate, b_x, w_gate, o_n, N, o_k, D, BM, PRECISION)
        b_up = _add(b_up, b_x, w_up, o_n, N, o_k, D, BM, PRECISION)
    b_gate = _finished(b_gate, square, eps, D, BM, True).to(dtype).to(tl.float32)
    b_up = _finished(b_up, square, eps, D, BM, True).to(dtype).to(tl.float32)
    b_y = (b_gate * tl.sigmoid(b_gate)).to(dtype).to(tl.float32) * b_up  # [BM, BN]
    p_y = y + o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    tl.store(p_y, b_y.to(dtype), mask=(o_m[:, None] < B) & (o_n[None, :] < N))


@triton.jit(do_not_specialize=["B"])
def add_kernel(
    x, w, h, B, D: tl.constexpr, N: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x [B, D], w [N, D], h [B, N]; a program reads and writes its own part of h alone."""
    dtype = h.dtype.element_ty
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    p_h = h + o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    mask = (o_m[:, None] < B) & (o_n[None, :] < N)
    b_h = tl.load(p_h, mask=mask, other=0.0).to(tl.float32)  # [BM, BN]
    square = tl.zeros([BM], tl.float32)
    b_y = _zeros(BM, BN, BK)
    for i_k in range((D + BK - 1) // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        b_x, square = _rows(x, x, square, o_m, o_k, B, D, False)
        b_y = _add(b_y, b_x, w, o_n, N, o_k, D, BM, PRECISION)
    b_y = _finished(b_y, square, 0.0, D, BM, False).to(dtype).to(tl.float32)
    tl.store(p_h, (b_h + b_y).to(dtype), mask=mask)


def project(x: Tensor, gain: Tensor, weights: Sequence[Tensor], out: Tensor, eps: float) -> None:
    """out [B, Σ N_i] = rmsnorm(x [B, D]) times each weight [N_i, D]; all contiguous, one dtype."""
    absent = MOST_WEIGHTS - len(weights)
    sizes = [len(w) for w in weights] + [0] * absent
    shape = blocks(x, max(sizes))
    blocks_n = sum(triton.cdiv(size, shape["BN"]) for size in sizes)
    with on_device(x):
        project_kernel[(blocks_n, triton.cdiv(len(x), shape["BM"]))](
            x, gain, *weights, *[weights[0]] * absent, out, len(x), eps, D=x.shape[1],
            **{f"N_{i}": size for i, size in enumerate(sizes)}, **shape,
        )  # fmt: skip


def gated_product(
    x: Tensor, gain: Tensor, gate: Tensor, up: Tensor, out: Tensor, eps: float
) -> None:
    """out [B, N] = silu(n gateᵀ) ⊙ (n upᵀ), n = rmsnorm(x [B, D])."""
    N = len(gate)
    shape = blocks(x, N)
    with on_device(x):
        gated_kernel[(triton.cdiv(N, shape["BN"]), triton.cdiv(len(x), shape["BM"]))](
            x, gain, gate, up, out, len(x), eps, D=x.shape[1], N=N, **shape
        )


def add_product(x: Tensor, weight: Tensor, total: Tensor) -> None:
    """total [B, N] ← total + x [B, D] weightᵀ."""
    N = len(weight)
    shape = blocks(x, N)
    with on_device(x):
        add_kernel[(triton.cdiv(N, shape["BN"]), triton.cdiv(len(x), shape["BM"]))](
            x, weight, total, len(x), D=x.shape[1], N=N, **shape
        )


def blocks(x: Tensor, N: int) -> dict[str, Any]:
    """The tile and the launch of a product of x [B, D] with N outputs.

    One row: whole rows of the weight where they fit, several programs on a multiprocessor. More
    rows: the matrix unit, whose tile has at least 16 rows, and weights loaded ahead. Few outputs
    get small tiles, so that all multiprocessors read.
    """
    B = len(x)
    if B == 1:
        BK = min(1024, triton.next_power_of_2(x.shape[1]))
        shape = {"BM": 1, "BN": 4 if N < 8192 else 8, "BK": BK, "num_warps": 4}
    else:
        BM = 16 if B <= 16 else 32 if B <= 32 else 64
        BN = 16 if N < 2048 else 32 if N < 8192 else 64
        shape = {"BM": BM, "BN": BN, "BK": 128, "num_warps": 4, "num_stages": 4}
        if x.element_size() == 4:
            shape |= {"BK": 32, "num_stages": 2}
    return shape | {"PRECISION": "ieee" if x.element_size() == 4 else precision(x)}
