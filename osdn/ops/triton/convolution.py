"""The short convolution's kernels: sums, SiLU and the norm in one pass over x.

    u_t = Σ_j w_{W−1−j} ⊙ x_{t−j},   z = silu(u),   y = z / sqrt(Σ_head z² + ε) with a norm

    dx_t = Σ_j w_{W−1−j} ⊙ du_{t+j},   dw_{W−1−j} = Σ_t du_t ⊙ x_{t−j}

A program takes one head (or 128 features where nothing is normed) of RUNS runs of LENGTH tokens and
walks along all runs at once, one token of each at a time: tiles are [RUNS, BD]. The forward walks
forwards with the last W inputs in registers; the backward walks backwards with these inputs, dx of
the last W tokens while it is summed, and dw. So x, dy and dx pass through memory once, but for the
W−1 tokens between two runs, which both take. All sums are float32. ROUND tokens are loaded at once,
while those before them are worked on.

Packed, ages [T] int32 says how many tokens of its own sequence stand before a token, at most W−1:
token t reads t − j where ages[t] ≥ j. Grid: B · blocks of RUNS · LENGTH tokens · heads.
"""

# Tuples of tiles grow as the kernels are compiled, and Triton has no (*tuple, x).
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc, var-annotated"
import torch
import triton
import triton.language as tl
from torch import Tensor

from osdn.ops.convolution import L2_EPS, ages_of
from osdn.ops.triton.chunks import ceil_div, on_device, power_of_two

# Numbers of a tile, tokens of a run, warps of a program, rounds under way at once; measured on an
# H200 (docs/log/2026-11-29-gpu.md). The backward makes du of W−1 more tokens than a run has.
FORWARD = {"elements": 512, "length": 64, "warps": 2, "stages": 3}
BACKWARD = {"elements": 512, "length": 128, "warps": 2, "stages": 2}
ROUND = 4  # tokens of a run that are loaded together; Triton pipelines no values older than a round


@triton.jit
def _place(T, D, RUNS: tl.constexpr, LENGTH: tl.constexpr, HEAD: tl.constexpr, BD: tl.constexpr):
    """(sequence, first token, the features' numbers [BD], their end, block of tokens)."""
    ND = tl.cdiv(D, HEAD)
    NT = tl.cdiv(T, RUNS * LENGTH)
    i_d = tl.program_id(0) % ND
    block = tl.program_id(0) // ND
    first = block % NT * (RUNS * LENGTH)
    return block // NT, first, i_d * HEAD + tl.arange(0, BD), min(D, (i_d + 1) * HEAD), block


@triton.jit
def _row(p, o_t, o_d, T, D_END, stride):
    """These tokens' features [RUNS, BD], 0 outside of the sequence."""
    mask = ((o_t >= 0) & (o_t < T))[:, None] & (o_d < D_END)[None, :]
    return tl.load(p + o_t.to(tl.int64)[:, None] * stride + o_d[None, :], mask=mask, other=0.0)


@triton.jit
def _round_of_ages(ages, o_t, step: tl.constexpr, T, PACKED: tl.constexpr, ROUND: tl.constexpr):
    """Ages [RUNS] of ROUND tokens of each run, the first at o_t; what is not used if not PACKED."""
    found = ()
    for r in tl.static_range(ROUND):
        t = o_t + r * step
        if PACKED:
            found = found + (tl.load(ages + t, mask=(t >= 0) & (t < T), other=0),)
        else:
            found = found + (t,)
    return found


@triton.jit
def _seen(b_x, age, j: tl.constexpr, PACKED: tl.constexpr):
    """x_{t−j} in float32 [RUNS, BD], 0 where token t does not read it."""
    b_x = b_x.to(tl.float32)
    if PACKED and j > 0:
        b_x = tl.where((age >= j)[:, None], b_x, 0.0)
    return b_x


@triton.jit
def _tap(weight, o_d, D_END, j: tl.constexpr, W: tl.constexpr):
    """w_{W−1−j} [1, BD], what x_{t−j} is multiplied with."""
    b_w = tl.load(weight + o_d * W + W - 1 - j, mask=o_d < D_END, other=0.0)
    return b_w.to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["T"])
def convolution_kernel(
    x, weight, ages, y, T, D, stride, eps,
    W: tl.constexpr, RUNS: tl.constexpr, LENGTH: tl.constexpr, HEAD: tl.constexpr,
    BD: tl.constexpr, NORM: tl.constexpr, PACKED: tl.constexpr,
    ROUND: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x [B, T, ·] with `stride` from token to token, y [B, T, D]."""
    i_b, first, o_d, D_END, _ = _place(T, D, RUNS, LENGTH, HEAD, BD)
    o_t = first + tl.arange(0, RUNS) * LENGTH  # the first token of each run
    x += i_b.to(tl.int64) * T * stride
    y += i_b.to(tl.int64) * T * D
    taps = ()
    for j in tl.static_range(W):
        taps = taps + (_tap(weight, o_d, D_END, j, W),)
    before = ()  # x_{t−1}, x_{t−2} … x_{t−W+1}
    for j in tl.static_range(1, W):
        before = before + (_row(x, o_t - j, o_d, T, D_END, stride),)
    coming = _round_of_ages(ages, o_t, 1, T, PACKED, ROUND)
    for i in tl.range(tl.cdiv(min(LENGTH, T - first), ROUND), num_stages=STAGES):
        marks, rows = coming, ()
        coming = _round_of_ages(ages, o_t + (i + 1) * ROUND, 1, T, PACKED, ROUND)
        for r in tl.static_range(ROUND):
            rows = rows + (_row(x, o_t + i * ROUND + r, o_d, T, D_END, stride),)
        for r in tl.static_range(ROUND):
            t = o_t + i * ROUND + r
            window = (rows[r],) + before
            u = tl.zeros([RUNS, BD], tl.float32)
            for j in tl.static_range(W):
                u += _seen(window[j], marks[r], j, PACKED) * taps[j]
            z = u * tl.sigmoid(u)
            if NORM:
                z *= tl.rsqrt(tl.sum(z * z, 1) + eps)[:, None]
            mask = (t < T)[:, None] & (o_d < D_END)[None, :]
            p_y = y + t.to(tl.int64)[:, None] * D + o_d[None, :]
            tl.store(p_y, z.to(y.dtype.element_ty), mask=mask)
            before = window[: W - 1]


@triton.jit(do_not_specialize=["T"])
def convolution_backward_kernel(
    dy, x, weight, ages, dx, parts, T, D, x_stride, dx_stride, eps,
    W: tl.constexpr, RUNS: tl.constexpr, LENGTH: tl.constexpr, HEAD: tl.constexpr,
    BD: tl.constexpr, NORM: tl.constexpr, PACKED: tl.constexpr,
    ROUND: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dy [B, T, D], x and dx [B, T, ·]; parts [B · blocks, W, D] float32: dweight's summands."""
    i_b, first, o_d, D_END, block = _place(T, D, RUNS, LENGTH, HEAD, BD)
    dy += i_b.to(tl.int64) * T * D
    x += i_b.to(tl.int64) * T * x_stride
    dx += i_b.to(tl.int64) * T * dx_stride
    # The walk starts with W − 1 tokens of the run behind, or at the sequence's end if it is nearer.
    steps = min(LENGTH + W - 1, T - first)
    last = first + tl.arange(0, RUNS) * LENGTH + steps - 1
    window = ()  # x_t, x_{t−1} … x_{t−W+2}
    sums = ()  # what later tokens add to dx of these tokens
    dws = ()
    taps = ()
    for j in tl.static_range(W):
        taps = taps + (_tap(weight, o_d, D_END, j, W),)
        dws = dws + (tl.zeros([RUNS, BD], tl.float32),)
        if j < W - 1:
            window = window + (_row(x, last - j, o_d, T, D_END, x_stride),)
            sums = sums + (tl.zeros([RUNS, BD], tl.float32),)
    coming = _round_of_ages(ages, last, -1, T, PACKED, ROUND)
    for i in tl.range(tl.cdiv(steps, ROUND), num_stages=STAGES):
        marks, rows, dys = coming, (), ()
        coming = _round_of_ages(ages, last - (i + 1) * ROUND, -1, T, PACKED, ROUND)
        for r in tl.static_range(ROUND):
            t = last - i * ROUND - r
            rows = rows + (_row(x, t - W + 1, o_d, T, D_END, x_stride),)
            dys = dys + (_row(dy, t, o_d, T, D_END, D),)
        for r in tl.static_range(ROUND):
            t, left = last - i * ROUND - r, steps - i * ROUND - r
            mine = (left <= LENGTH) & (left > 0)  # neither of the run behind nor before this one
            window, age = window + (rows[r],), marks[r]
            u = tl.zeros([RUNS, BD], tl.float32)
            for j in tl.static_range(W):
                u += _seen(window[j], age, j, PACKED) * taps[j]
            s = tl.sigmoid(u)
            dz = dys[r].to(tl.float32)
            if NORM:
                z = u * s
                inverse = tl.rsqrt(tl.sum(z * z, 1) + eps)  # [RUNS]
                along = inverse * inverse * tl.sum(dz * z, 1)
                dz = inverse[:, None] * (dz - z * along[:, None])
            du = dz * s * (1 + u * (1 - s))  # [RUNS, BD]

            own = tl.where(mine, du, 0.0)
            new_dws, new_sums = (), ()
            for j in tl.static_range(W):
                new_dws = new_dws + (dws[j] + own * _seen(window[j], age, j, PACKED),)
                part = _seen(du, age, j, PACKED) * taps[j]
                if j < W - 1:
                    part += sums[j]
                new_sums = new_sums + (part,)
            p_dx = dx + t.to(tl.int64)[:, None] * dx_stride + o_d[None, :]
            mask = (t < tl.where(mine, T, -ROUND))[:, None] & (o_d < D_END)[None, :]
            tl.store(p_dx, new_sums[0].to(dx.dtype.element_ty), mask=mask)
            window, sums, dws = window[1:], new_sums[1:], new_dws
    for j in tl.static_range(W):
        p_parts = parts + (block.to(tl.int64) * W + W - 1 - j) * D + o_d
        tl.store(p_parts, tl.sum(dws[j], 0), mask=o_d < D_END)


def forward(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None, head_dim: int | None) -> Tensor:
    """y, contiguous; the contract is osdn.ops.convolution's."""
    x, weight = _rows(x), weight.contiguous()
    (B, T, D), W = x.shape, weight.shape[1]
    y = torch.empty(B, T, D, dtype=x.dtype, device=x.device)
    with on_device(x):
        ages, shape = ages_of(cu_seqlens, T, W), _shape(D, head_dim, **FORWARD)
        convolution_kernel[(_blocks(x, shape) * ceil_div(D, shape["HEAD"]),)](
            x, weight, x if ages is None else ages, y, T, D, x.stride(1), L2_EPS, W=W,
            NORM=head_dim is not None, PACKED=ages is not None, **shape,
        )  # fmt: skip
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    cu_seqlens: Tensor | None,
    head_dim: int | None,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(dx, dweight); the contract is osdn.ops.convolution's. dx: where to write it."""
    dy, x, weight = dy.contiguous(), _rows(x), weight.contiguous()
    (B, T, D), W = x.shape, weight.shape[1]
    dx = torch.empty(B, T, D, dtype=x.dtype, device=x.device) if dx is None else dx
    with on_device(x):
        ages, shape = ages_of(cu_seqlens, T, W), _shape(D, head_dim, **BACKWARD)
        blocks = _blocks(x, shape)
        parts = torch.empty(blocks, W, D, dtype=torch.float32, device=x.device)
        convolution_backward_kernel[(blocks * ceil_div(D, shape["HEAD"]),)](
            dy, x, weight, x if ages is None else ages, dx, parts, T, D, x.stride(1), dx.stride(1),
            L2_EPS, W=W, NORM=head_dim is not None, PACKED=ages is not None, **shape,
        )  # fmt: skip
    return dx, parts.sum(0).t().to(weight.dtype).contiguous()


def _rows(x: Tensor) -> Tensor:
    """x [B, T, D] itself where it is some columns of a contiguous tensor, else a copy."""
    plain = x.stride(2) == 1 and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1))
    return x if plain else x.contiguous()


def _shape(
    D: int, head_dim: int | None, *, elements: int, length: int, warps: int, stages: int
) -> dict[str, int]:
    """A program's features, a head's or 128, padded to a power of two, its runs and its warps."""
    head = min(128, D) if head_dim is None else head_dim
    padded = power_of_two(head)
    runs = max(1, elements // padded)
    return {"HEAD": head, "BD": padded, "RUNS": runs, "LENGTH": length, "ROUND": ROUND,
            "STAGES": stages, "num_warps": warps}  # fmt: skip


def _blocks(x: Tensor, shape: dict[str, int]) -> int:
    return x.shape[0] * ceil_div(x.shape[1], shape["RUNS"] * shape["LENGTH"])
