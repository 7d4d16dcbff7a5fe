"""The matrix products of a decoding step, with the norm before them and the addition after them.

A step multiplies each weight by B rows only, so it costs one pass over the weights. Each kernel
reads its weight once and does its neighbours' elementwise work on the way:

    embed          h = E[ids]                          starts the residual stream
    project        y = rmsnorm(h) [W_0; W_1; …]ᵀ       one launch, up to seven weights
    gated_product  y = silu(n W_gateᵀ) ⊙ (n W_upᵀ)     n = rmsnorm(h), the first half of a SwiGLU
    add_product    h ← h + x Wᵀ                        a residual connection, in place

Grid: (blocks of BN outputs, blocks of BM rows). Weights stay where they are, so a captured launch
sees a change of their values. Sums are float32; results are rounded where a module would round
them. The norm's factor 1/rms is one number a row, so it multiplies the finished sums. For several
rows, whoever writes h also writes h ⊙ gain for the next norm and its part of Σ h² (see `Stream`),
so that a product only loads and multiplies.

Each kernel may start while the one before it ends (programmatic dependent launch, sm_90): it first
loads what no kernel of the step writes, then waits. All of them wait, so all that came earlier is
complete by then. `embed` starts the chain and is launched as usual.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from osdn.ops.triton.chunks import ceil_div, on_device, power_of_two
from osdn.ops.triton.config import precision

MOST_WEIGHTS = 7  # of one launch of `project`


class Stream(NamedTuple):
    """The residual stream between two products.

    hidden: [B, D].  scaled: [B, D], hidden ⊙ the next norm's weight.  squares: [P, B] float32, Σ h²
    over each of P blocks of columns. The last two are written and read where B > 1.
    """

    hidden: Tensor
    scaled: Tensor
    squares: Tensor


def stream_like(hidden: Tensor) -> Stream:
    """Empty, around a hidden [B, D]."""
    B, D = hidden.shape
    parts = ceil_div(D, blocks(hidden, D)["BN"])
    squares = torch.empty(parts, B, dtype=torch.float32, device=hidden.device)
    return Stream(hidden, torch.empty_like(hidden), squares)


@triton.jit
def _weight(w, o_n, N, i_k, D: tl.constexpr, BK: tl.constexpr):
    """[BN, BK]"""
    o_k = i_k * BK + tl.arange(0, BK)
    mask = (o_n[:, None] < N) & (o_k[None, :] < D)
    return tl.load(w + o_n.to(tl.int64)[:, None] * D + o_k[None, :], mask=mask, other=0.0)


@triton.jit
def _rows(x, o_m, i_k, B, D: tl.constexpr, BK: tl.constexpr):
    """[BM, BK]"""
    o_k = i_k * BK + tl.arange(0, BK)
    mask = (o_m[:, None] < B) & (o_k[None, :] < D)
    return tl.load(x + o_m.to(tl.int64)[:, None] * D + o_k[None, :], mask=mask, other=0.0)


@triton.jit
def _row_times(
    b_w, x, gain, w, o_n, N, i_k, square, D: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr
):
    """For one row: (b_w ⊙ x over these inputs [BN, BK], the next b_w, Σ x² so far)."""
    o_k = i_k * BK + tl.arange(0, BK)
    b_x = tl.load(x + o_k, mask=o_k < D, other=0.0)
    if NORM:
        b_wide = b_x.to(tl.float32)
        square += tl.sum(b_wide * b_wide, 0)
        b_gain = tl.load(gain + o_k, mask=o_k < D, other=0.0).to(tl.float32)
        b_x = (b_wide * b_gain).to(b_x.dtype)
    b_y = b_w.to(tl.float32) * b_x.to(tl.float32)[None, :]
    return b_y, _weight(w, o_n, N, i_k + 1, D, BK), square


@triton.jit
def _inverse_rms(squares, o_m, B, eps, D: tl.constexpr, P: tl.constexpr, BP: tl.constexpr):
    """[BM], from the parts of Σ h²."""
    o_p = tl.arange(0, BP)
    mask = (o_p[:, None] < P) & (o_m[None, :] < B)
    b_parts = tl.load(squares + o_p[:, None] * B + o_m[None, :], mask=mask, other=0.0)
    return tl.rsqrt(tl.sum(b_parts, 0) / D + eps)


@triton.jit(do_not_specialize=["B"])
def embed_kernel(
    ids, table, gain, h, scaled, squares, B, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Rows ids [B] of table [·, D]. Grid: (blocks of columns, blocks of rows)."""
    if EARLY:
        gdc_launch_dependents()
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    mask = (o_m[:, None] < B) & (o_n[None, :] < D)
    b_ids = tl.load(ids + o_m, mask=o_m < B, other=0)
    b_h = tl.load(table + b_ids[:, None] * D + o_n[None, :], mask=mask, other=0.0)  # [BM, BN]
    o = o_m.to(tl.int64)[:, None] * D + o_n[None, :]
    tl.store(h + o, b_h, mask=mask)
    if BM > 1:
        _feed(b_h, gain, scaled + o, squares, o_m, o_n, mask, B, D)


@triton.jit
def _feed(b_h, gain, p_scaled, squares, o_m, o_n, mask, B, D: tl.constexpr):
    """Write what the next norm needs of this part of h [BM, BN]."""
    b_wide = b_h.to(tl.float32)
    b_gain = tl.load(gain + o_n, mask=o_n < D, other=0.0).to(tl.float32)
    tl.store(p_scaled, (b_wide * b_gain[None, :]).to(b_h.dtype), mask=mask)
    tl.store(squares + tl.program_id(0) * B + o_m, tl.sum(b_wide * b_wide, 1), mask=o_m < B)


@triton.jit(do_not_specialize=["B"])
def project_kernel(
    h, scaled, squares, gain, w_0, w_1, w_2, w_3, w_4, w_5, w_6, y, B, eps,
    D: tl.constexpr,
    N_0: tl.constexpr, N_1: tl.constexpr, N_2: tl.constexpr, N_3: tl.constexpr,
    N_4: tl.constexpr, N_5: tl.constexpr, N_6: tl.constexpr, P: tl.constexpr, BP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """w_i [N_i, D], y [B, Σ N_i]. A program's outputs are of one weight."""
    if EARLY:
        gdc_launch_dependents()
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
                        if i_n >= (N_5 + BN - 1) // BN:
                            w, N, column, i_n = w_6, N_6, column + N_5, i_n - (N_5 + BN - 1) // BN
    o_n = i_n * BN + tl.arange(0, BN)
    if BM == 1:
        b_w = _weight(w, o_n, N, 0, D, BK)
        if EARLY:
            gdc_wait()
        square = 0.0
        b_sum = tl.zeros([BN, BK], tl.float32)
        for i_k in tl.static_range((D + BK - 1) // BK):
            b_y, b_w, square = _row_times(b_w, h, gain, w, o_n, N, i_k, square, D, BK, True)
            b_sum += b_y
        b_y = tl.sum(b_sum, 1)[None, :] * tl.rsqrt(square / D + eps)
    else:
        if EARLY:
            gdc_wait()
        b_y = tl.zeros([BM, BN], tl.float32)
        for i_k in range((D + BK - 1) // BK):
            b_x, b_w = _rows(scaled, o_m, i_k, B, D, BK), _weight(w, o_n, N, i_k, D, BK)
            b_y = tl.dot(b_x, tl.trans(b_w), b_y, input_precision=PRECISION)
        b_y *= _inverse_rms(squares, o_m, B, eps, D, P, BP)[:, None]
    p_y = y + o_m.to(tl.int64)[:, None] * (N_0 + N_1 + N_2 + N_3 + N_4 + N_5 + N_6) + column
    mask = (o_m[:, None] < B) & (o_n[None, :] < N)
    tl.store(p_y + o_n[None, :], b_y.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["B"])
def gated_kernel(
    h, scaled, squares, gain, w_gate, w_up, y, B, eps, D: tl.constexpr, N: tl.constexpr,
    P: tl.constexpr, BP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Both weights [N, D], y [B, N]."""
    if EARLY:
        gdc_launch_dependents()
    dtype = y.dtype.element_ty
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    if BM == 1:
        b_wg, b_wu = _weight(w_gate, o_n, N, 0, D, BK), _weight(w_up, o_n, N, 0, D, BK)
        if EARLY:
            gdc_wait()
        square, unused = 0.0, 0.0
        b_gates, b_ups = tl.zeros([BN, BK], tl.float32), tl.zeros([BN, BK], tl.float32)
        for i_k in tl.static_range((D + BK - 1) // BK):
            b_g, b_wg, square = _row_times(b_wg, h, gain, w_gate, o_n, N, i_k, square, D, BK, True)
            b_u, b_wu, unused = _row_times(b_wu, h, gain, w_up, o_n, N, i_k, unused, D, BK, True)
            b_gates += b_g
            b_ups += b_u
        inverse = tl.rsqrt(square / D + eps)
        b_gate, b_up = tl.sum(b_gates, 1)[None, :] * inverse, tl.sum(b_ups, 1)[None, :] * inverse
    else:
        if EARLY:
            gdc_wait()
        b_gate, b_up = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32)
        for i_k in range((D + BK - 1) // BK):
            b_x = _rows(scaled, o_m, i_k, B, D, BK)
            b_wg, b_wu = _weight(w_gate, o_n, N, i_k, D, BK), _weight(w_up, o_n, N, i_k, D, BK)
            b_gate = tl.dot(b_x, tl.trans(b_wg), b_gate, input_precision=PRECISION)
            b_up = tl.dot(b_x, tl.trans(b_wu), b_up, input_precision=PRECISION)
        inverse = _inverse_rms(squares, o_m, B, eps, D, P, BP)[:, None]
        b_gate, b_up = b_gate * inverse, b_up * inverse
    b_gate, b_up = b_gate.to(dtype).to(tl.float32), b_up.to(dtype).to(tl.float32)
    b_y = (b_gate * tl.sigmoid(b_gate)).to(dtype).to(tl.float32) * b_up  # [BM, BN]
    p_y = y + o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    tl.store(p_y, b_y.to(dtype), mask=(o_m[:, None] < B) & (o_n[None, :] < N))


@triton.jit(do_not_specialize=["B"])
def add_kernel(
    x, w, gain, h, scaled, squares, B, D: tl.constexpr, N: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """x [B, D], w [N, D], h [B, N]; a program reads and writes only its own part of h."""
    if EARLY:
        gdc_launch_dependents()
    dtype = h.dtype.element_ty
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    o = o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    mask = (o_m[:, None] < B) & (o_n[None, :] < N)
    if BM == 1:
        b_w = _weight(w, o_n, N, 0, D, BK)
        if EARLY:
            gdc_wait()
        b_h = tl.load(h + o, mask=mask, other=0.0).to(tl.float32)  # [BM, BN]
        b_sum = tl.zeros([BN, BK], tl.float32)
        for i_k in tl.static_range((D + BK - 1) // BK):
            b_y, b_w, _ = _row_times(b_w, x, x, w, o_n, N, i_k, 0.0, D, BK, False)
            b_sum += b_y
        b_y = tl.sum(b_sum, 1)[None, :]
    else:
        if EARLY:
            gdc_wait()
        b_h = tl.load(h + o, mask=mask, other=0.0).to(tl.float32)
        b_y = tl.zeros([BM, BN], tl.float32)
        for i_k in range((D + BK - 1) // BK):
            b_x, b_w = _rows(x, o_m, i_k, B, D, BK), _weight(w, o_n, N, i_k, D, BK)
            b_y = tl.dot(b_x, tl.trans(b_w), b_y, input_precision=PRECISION)
    b_h = (b_h + b_y.to(dtype).to(tl.float32)).to(dtype)
    tl.store(h + o, b_h, mask=mask)
    if BM > 1:
        _feed(b_h, gain, scaled + o, squares, o_m, o_n, mask, B, N)


def embed(ids: Tensor, table: Tensor, gain: Tensor, stream: Stream) -> None:
    """hidden = table[ids]; gain [D] is the next norm's weight, here and below."""
    B, D = stream.hidden.shape
    shape = {name: blocks(stream.hidden, D)[name] for name in ("BM", "BN", "num_warps")}
    with on_device(table):
        embed_kernel[_grid(B, D, shape)](
            ids, table, gain, *stream, B, D=D, EARLY=_overlaps(table), **shape
        )


def project(
    stream: Stream, gain: Tensor, weights: Sequence[Tensor], out: Tensor, eps: float
) -> None:
    """out [B, Σ N_i] = rmsnorm(hidden) times each weight [N_i, D]; all contiguous, one dtype."""
    B, D = stream.hidden.shape
    absent = MOST_WEIGHTS - len(weights)
    sizes = [len(w) for w in weights] + [0] * absent
    shape = blocks(stream.hidden, max(sizes))
    blocks_n = sum(ceil_div(size, shape["BN"]) for size in sizes)
    with on_device(out):
        project_kernel[(blocks_n, ceil_div(B, shape["BM"]))](
            *stream, gain, *weights, *[weights[0]] * absent, out, B, eps, D=D,
            **{f"N_{i}": size for i, size in enumerate(sizes)}, **_parts(stream),
            **shape, **overlap(out),
        )  # fmt: skip


def gated_product(
    stream: Stream, gain: Tensor, gate: Tensor, up: Tensor, out: Tensor, eps: float
) -> None:
    """out [B, N] = silu(n gateᵀ) ⊙ (n upᵀ), n = rmsnorm(hidden)."""
    (B, D), N = stream.hidden.shape, len(gate)
    shape = blocks(stream.hidden, N)
    with on_device(out):
        gated_kernel[_grid(B, N, shape)](
            *stream, gain, gate, up, out, B, eps, D=D, N=N, **_parts(stream), **shape,
            **overlap(out),
        )  # fmt: skip


def add_product(x: Tensor, weight: Tensor, gain: Tensor, stream: Stream) -> None:
    """hidden ← hidden + x [B, ·] weightᵀ."""
    B, N = stream.hidden.shape
    shape = blocks(stream.hidden, N)
    with on_device(x):
        add_kernel[_grid(B, N, shape)](
            x, weight, gain, *stream, B, D=x.shape[1], N=N, **shape, **overlap(x)
        )


def blocks(x: Tensor, N: int) -> dict[str, Any]:
    """The tile and the launch of a product of x [B, ·] with N outputs.

    One row: long rows of few outputs, several programs on a multiprocessor. More rows: the matrix
    unit, whose tile has at least 16 rows, and weights loaded ahead. Few outputs get small tiles, so
    that all multiprocessors read. Chosen on an H100 (docs/log/2026-11-28-generation.md).
    """
    B, wide = len(x), x.element_size() == 4
    exact = {"PRECISION": "ieee" if wide else precision(x)}
    if B == 1:
        return exact | {"BM": 1, "BN": 4 if N < 8192 else 8, "BK": 1024, "num_warps": 8}
    if wide:  # no matrix unit: larger tiles take long to compile
        return exact | {"BM": 16, "BN": 16, "BK": 32, "num_warps": 4, "num_stages": 2}
    BM = 16 if B <= 16 else 32 if B <= 32 else 64
    BN = 16 if N < 2048 and BM < 64 else 32 if N < 8192 else 64
    launch = {"num_warps": 2, "num_stages": 5} if BM < 64 else {"num_warps": 4, "num_stages": 4}
    return exact | {"BM": BM, "BN": BN, "BK": 128} | launch


def overlap(x: Tensor) -> dict[str, bool]:
    """The launch options of a kernel that starts early, where the GPU can do that."""
    return {"EARLY": True, "launch_pdl": True} if _overlaps(x) else {"EARLY": False}


def _overlaps(x: Tensor) -> bool:
    if not x.is_cuda or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(x.device) >= (9, 0)


def _grid(B: int, N: int, shape: dict[str, Any]) -> tuple[int, int]:
    return ceil_div(N, shape["BN"]), ceil_div(B, shape["BM"])


def _parts(stream: Stream) -> dict[str, int]:
    parts = len(stream.squares)
    return {"P": parts, "BP": power_of_two(parts)}
