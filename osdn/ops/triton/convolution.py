"""The short convolution's kernels: sums, SiLU and the norm in one pass over x.

A program takes BLOCK rows of one head (of BD features where nothing is normed). The W shifted reads
of a row come from the cache but for the first. The backward makes u = Σ_j w_j ⊙ x_{t−W+1+j} again:
one kernel writes du in float32 and each program's part of dweight, another sums du over the W rows
that read a row. Row t − j is read where no sequence starts in t − j + 1 .. t.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from osdn.ops.convolution import L2_EPS, starts_of
from osdn.ops.triton.chunks import on_device

ELEMENTS = 2048  # of a program's tile
WARPS = 2
ROWS = 128  # at least, of a program of the backward, which writes one part of dweight


@triton.jit
def _sums(x, weight, starts, rows, o_d, T, D, D_END,
          W: tl.constexpr, PACKED: tl.constexpr):  # fmt: skip
    """u of these rows in float32; x points to the sequence's first row."""
    inside = rows < T
    columns = o_d < D_END
    u = tl.zeros([rows.shape[0], o_d.shape[0]], tl.float32)
    for j in tl.static_range(W):
        if j > 0:
            inside = inside & (rows >= j)
            if PACKED:
                inside = inside & (tl.load(starts + rows - j + 1, mask=inside, other=1) == 0)
        p = x + (rows - j).to(tl.int64)[:, None] * D + o_d[None, :]
        b_x = tl.load(p, mask=inside[:, None] & columns[None, :], other=0.0)
        b_w = tl.load(weight + o_d * W + W - 1 - j, mask=columns, other=0.0)
        u += b_x.to(tl.float32) * b_w.to(tl.float32)[None, :]
    return u


@triton.jit
def _place(T, D, BLOCK: tl.constexpr, HEAD: tl.constexpr, BD: tl.constexpr, TILES: tl.constexpr):
    """(sequence, first row, the features' numbers, their end) of this program."""
    ND = tl.cdiv(D, HEAD)
    NT = tl.cdiv(T, BLOCK * TILES)
    i_d = tl.program_id(0) % ND
    i_t = tl.program_id(0) // ND % NT
    i_b = tl.program_id(0) // ND // NT
    return i_b, i_t * (BLOCK * TILES), i_d * HEAD + tl.arange(0, BD), min(D, (i_d + 1) * HEAD)


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    x, weight, starts, y, T, D, eps,
    W: tl.constexpr, BLOCK: tl.constexpr, HEAD: tl.constexpr, BD: tl.constexpr,
    NORM: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """y [B, T, D]. Grid: B · blocks of rows · heads."""
    i_b, first, o_d, D_END = _place(T, D, BLOCK, HEAD, BD, 1)
    at = i_b.to(tl.int64) * T * D
    rows = first + tl.arange(0, BLOCK)
    u = _sums(x + at, weight, starts, rows, o_d, T, D, D_END, W, PACKED)
    z = u * tl.sigmoid(u)
    if NORM:
        z *= tl.rsqrt(tl.sum(z * z, 1) + eps)[:, None]
    p = y + at + rows.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p, z.to(y.dtype.element_ty), mask=(rows < T)[:, None] & (o_d < D_END)[None, :])


@triton.jit(do_not_specialize=["T"])
def sums_backward_kernel(
    dy, x, weight, starts, du, parts, T, D, eps,
    W: tl.constexpr, BW: tl.constexpr, BLOCK: tl.constexpr, HEAD: tl.constexpr, BD: tl.constexpr,
    TILES: tl.constexpr, NORM: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """du [B, T, D] float32; parts [B · blocks of TILES · BLOCK rows, W, D]: dweight's summands."""
    i_b, first, o_d, D_END = _place(T, D, BLOCK, HEAD, BD, TILES)
    at = i_b.to(tl.int64) * T * D
    columns = o_d < D_END
    o_w = tl.arange(0, BW)
    part = tl.zeros([BW, BD], tl.float32)
    for i in range(TILES):
        rows = first + i * BLOCK + tl.arange(0, BLOCK)
        u = _sums(x + at, weight, starts, rows, o_d, T, D, D_END, W, PACKED)
        s = tl.sigmoid(u)
        inside = rows < T
        here = rows.to(tl.int64)[:, None] * D + o_d[None, :]
        mask = inside[:, None] & columns[None, :]
        dz = tl.load(dy + at + here, mask=mask, other=0.0).to(tl.float32)
        if NORM:
            z = u * s
            r = tl.rsqrt(tl.sum(z * z, 1) + eps)[:, None]
            dz = r * (dz - z * (r * r * tl.sum(dz * z, 1)[:, None]))
        b_du = dz * s * (1 + u * (1 - s))
        tl.store(du + at + here, b_du, mask=mask)
        for j in tl.static_range(W):
            if j > 0:
                inside = inside & (rows >= j)
                if PACKED:
                    inside = inside & (tl.load(starts + rows - j + 1, mask=inside, other=1) == 0)
            p = x + at + (rows - j).to(tl.int64)[:, None] * D + o_d[None, :]
            b_x = tl.load(p, mask=inside[:, None] & columns[None, :], other=0.0)
            b_w = tl.sum(b_du * b_x.to(tl.float32), 0)
            part += tl.where((o_w == W - 1 - j)[:, None], b_w[None, :], 0.0)
    block = tl.program_id(0) // tl.cdiv(D, HEAD)
    p = parts + (block.to(tl.int64) * W + o_w)[:, None] * D + o_d[None, :]
    tl.store(p, part, mask=(o_w < W)[:, None] & columns[None, :])


@triton.jit(do_not_specialize=["T"])
def input_backward_kernel(
    du, weight, starts, dx, T, D,
    W: tl.constexpr, BLOCK: tl.constexpr, HEAD: tl.constexpr, BD: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """dx_t = Σ_j w_{W−1−j} ⊙ du_{t+j}. Grid: B · blocks of rows · blocks of features."""
    i_b, first, o_d, D_END = _place(T, D, BLOCK, HEAD, BD, 1)
    at = i_b.to(tl.int64) * T * D
    columns = o_d < D_END
    rows = first + tl.arange(0, BLOCK)
    inside = rows < T
    b_dx = tl.zeros([BLOCK, BD], tl.float32)
    for j in tl.static_range(W):
        if j > 0:
            inside = inside & (rows + j < T)
            if PACKED:
                inside = inside & (tl.load(starts + rows + j, mask=inside, other=1) == 0)
        p = du + at + (rows + j).to(tl.int64)[:, None] * D + o_d[None, :]
        b_du = tl.load(p, mask=inside[:, None] & columns[None, :], other=0.0)
        b_w = tl.load(weight + o_d * W + W - 1 - j, mask=columns, other=0.0)
        b_dx += b_du * b_w.to(tl.float32)[None, :]
    p = dx + at + rows.to(tl.int64)[:, None] * D + o_d[None, :]
    mask = (rows < T)[:, None] & columns[None, :]
    tl.store(p, b_dx.to(dx.dtype.element_ty), mask=mask)


def forward(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None, head_dim: int | None) -> Tensor:
    """y; the contract is osdn.ops.convolution's."""
    x, weight = x.contiguous(), weight.contiguous()
    T, D = x.shape[1:]
    y = torch.empty_like(x)
    with on_device(x):
        starts, shape = starts_of(cu_seqlens, T), _shape(D, head_dim)
        forward_kernel[(_programs(x, shape),)](
            x, weight, x if starts is None else starts, y, T, D, L2_EPS, W=weight.shape[1],
            NORM=head_dim is not None, PACKED=starts is not None, num_warps=WARPS, **shape,
        )  # fmt: skip
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, cu_seqlens: Tensor | None, head_dim: int | None
) -> tuple[Tensor, Tensor]:
    """(dx, dweight); the contract is osdn.ops.convolution's."""
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    (B, T, D), W = x.shape, weight.shape[1]
    du, dx = torch.empty(B, T, D, dtype=torch.float32, device=x.device), torch.empty_like(x)
    with on_device(x):
        starts, shape = starts_of(cu_seqlens, T), _shape(D, head_dim)
        sequences = x if starts is None else starts
        tiles = triton.cdiv(ROWS, shape["BLOCK"])
        programs = _programs(x, shape, tiles)
        parts = du.new_empty(programs // triton.cdiv(D, shape["HEAD"]), W, D)
        sums_backward_kernel[(programs,)](
            dy, x, weight, sequences, du, parts, T, D, L2_EPS, W=W, BW=triton.next_power_of_2(W),
            TILES=tiles, NORM=head_dim is not None, PACKED=starts is not None, num_warps=WARPS,
            **shape,
        )  # fmt: skip
        shape = _shape(D, None)
        input_backward_kernel[(_programs(x, shape),)](
            du, weight, sequences, dx, T, D, W=W, PACKED=starts is not None, num_warps=WARPS,
            **shape,
        )  # fmt: skip
    return dx, parts.sum(0).t().to(weight.dtype).contiguous()


def _shape(D: int, head_dim: int | None) -> dict[str, int]:
    """A program's features, a head's or 128, padded to a power of two, and its rows."""
    head = min(128, D) if head_dim is None else head_dim
    padded = triton.next_power_of_2(head)
    return {"HEAD": head, "BD": padded, "BLOCK": max(4, ELEMENTS // padded)}


def _programs(x: Tensor, shape: dict[str, int], tiles: int = 1) -> int:
    B, T, D = x.shape
    return B * triton.cdiv(T, shape["BLOCK"] * tiles) * triton.cdiv(D, shape["HEAD"])
