"""The inverse of a unit lower-triangular 64 × 64 matrix, in float32.

(I + L)⁻¹ in 16 × 16 blocks: each diagonal block by forward substitution, row by row (stable
whatever the size of L's entries, which a product of powers of L is not), then those below from

    X_ij = −X_ii Σ_{j ≤ m < i} L_im X_mj.

The substitution goes through a scratch of 4 KiB a program, which stays in the cache: a thread there
keeps whole columns of X and reads the entries of L that it multiplies them by, so that no row has
to be picked out of registers. One warp executed 367 instructions a row without it, and 45 with it.
"""

import triton
import triton.language as tl

SCRATCH = 1024  # float32 numbers a program


@triton.jit
def _substitute(p):
    """The four [16, 16] blocks at p: from L (its strictly lower part) to (I + L)⁻¹, in place."""
    o_s = tl.arange(0, 64)
    column = o_s % 16
    p_b = p + o_s // 16 * 256  # the block of each of 4 × 16 columns
    X = (tl.where(column == 0, 1.0, 0.0),)  # rows, [64] each: one of every block
    for i in tl.static_range(1, 16):
        row = tl.where(column == i, 1.0, 0.0)
        for j in tl.static_range(0, i):
            row -= tl.load(p_b + (i * 16 + j)) * X[j]  # [64]: L_ij of each column's block
        X = X + (row,)  # type: ignore[assignment]  # noqa: RUF005 (Triton knows no stars)
    tl.debug_barrier()  # every thread has read L
    for i in tl.static_range(0, 16):
        tl.store(p_b + i * 16 + column, X[i])
    tl.debug_barrier()


@triton.jit
def mul(x, y, PREC: tl.constexpr):
    """x y in float32: with PREC "tf32x3", as three tf32 products, about float32's own accuracy."""
    return tl.dot(x, y, input_precision=PREC)


@triton.jit
def split(x):
    """x [R, C] in float32, whose numbers are products of two bfloat16 numbers, as a sum of two
    tensors of bfloat16 numbers, exactly."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def mul_exactly(x, y, acc):
    """acc + x yᵀ in float32 for float32 x and y: as (high, low) of `split`, in four bfloat16
    products and exactly; as tensors, as three tf32 products."""
    if isinstance(x, tl.tuple):
        acc = tl.dot(x[0], tl.trans(y[0]), acc)  # [R, C] [C, R], as the rest
        acc = tl.dot(x[0], tl.trans(y[1]), acc)
        acc = tl.dot(x[1], tl.trans(y[0]), acc)
        acc = tl.dot(x[1], tl.trans(y[1]), acc)
    else:
        acc = tl.dot(x, tl.trans(y), acc, input_precision="tf32x3")
    return acc


@triton.jit
def invert(L00, L10, L11, L20, L21, L22, L30, L31, L32, L33, scratch, PREC: tl.constexpr):
    """The ten blocks of (I + L)⁻¹; of L00, L11, L22, L33 only the strictly lower part is used.

    scratch: `SCRATCH` numbers of this program's own.
    """
    o_s = tl.arange(0, 16)
    o_b = o_s[:, None] * 16 + o_s[None, :]
    tl.store(scratch + o_b, L00)
    tl.store(scratch + 256 + o_b, L11)
    tl.store(scratch + 512 + o_b, L22)
    tl.store(scratch + 768 + o_b, L33)
    tl.debug_barrier()
    _substitute(scratch)
    X00 = tl.load(scratch + o_b)  # [16, 16]
    X11 = tl.load(scratch + 256 + o_b)
    X22 = tl.load(scratch + 512 + o_b)
    X33 = tl.load(scratch + 768 + o_b)
    # Below the diagonal, nearest first: [16, 16] products.
    X10 = -mul(mul(X11, L10, PREC), X00, PREC)
    X21 = -mul(mul(X22, L21, PREC), X11, PREC)
    X32 = -mul(mul(X33, L32, PREC), X22, PREC)
    X20 = -mul(X22, mul(L20, X00, PREC) + mul(L21, X10, PREC), PREC)
    X31 = -mul(X33, mul(L31, X11, PREC) + mul(L32, X21, PREC), PREC)
    X30 = -mul(X33, mul(L30, X00, PREC) + mul(L31, X10, PREC) + mul(L32, X20, PREC), PREC)
    return X00, X10, X11, X20, X21, X22, X30, X31, X32, X33


@triton.jit
def store_blocks(p, stride, left, X):
    """Write the lower blocks X, and zeros above them, as a [64, 64] tile with the given row stride;
    rows ≥ left are not written."""
    X00, X10, X11, X20, X21, X22, X30, X31, X32, X33 = X
    o_s = tl.arange(0, 16)
    p = p + o_s[:, None] * stride + o_s[None, :]
    zero = tl.zeros([16, 16], tl.float32)
    _store_row(p, o_s, left, X00, zero, zero, zero)
    _store_row(p + 16 * stride, o_s + 16, left, X10, X11, zero, zero)
    _store_row(p + 32 * stride, o_s + 32, left, X20, X21, X22, zero)
    _store_row(p + 48 * stride, o_s + 48, left, X30, X31, X32, X33)


@triton.jit
def store_transposed_blocks(p, stride, left, X):
    """Write the transpose of the same tile."""
    X00, X10, X11, X20, X21, X22, X30, X31, X32, X33 = X
    o_s = tl.arange(0, 16)
    zero = tl.zeros([16, 16], tl.float32)
    _store_column(p, stride, o_s, left, X00, X10, X20, X30)
    _store_column(p, stride, o_s + 16, left, zero, X11, X21, X31)
    _store_column(p, stride, o_s + 32, left, zero, zero, X22, X32)
    _store_column(p, stride, o_s + 48, left, zero, zero, zero, X33)


@triton.jit
def _store_column(p, stride, o_t, left, X0, X1, X2, X3):
    """Four blocks, one below the other, as the tile's rows o_t."""
    type = p.dtype.element_ty
    p = p + o_t[None, :] * stride + tl.arange(0, 16)[:, None]
    m = o_t[None, :] < left
    tl.store(p, X0.to(type), mask=m)
    tl.store(p + 16, X1.to(type), mask=m)
    tl.store(p + 32, X2.to(type), mask=m)
    tl.store(p + 48, X3.to(type), mask=m)


@triton.jit
def _store_row(p, o_t, left, X0, X1, X2, X3):
    """Four blocks side by side."""
    type = p.dtype.element_ty
    m = o_t[:, None] < left
    tl.store(p, X0.to(type), mask=m)
    tl.store(p + 16, X1.to(type), mask=m)
    tl.store(p + 32, X2.to(type), mask=m)
    tl.store(p + 48, X3.to(type), mask=m)
