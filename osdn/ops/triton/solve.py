"""The inverse of a unit lower-triangular 64 × 64 matrix, in registers, float32.

(I + L)⁻¹ in 16 × 16 blocks: each diagonal block by forward substitution, row by row (stable
whatever the size of L's entries, which a product of powers of L is not), then those below from

    X_ij = −X_ii Σ_{j ≤ m < i} L_im X_mj.
"""

import triton
import triton.language as tl


@triton.jit
def _substitute(i, X, o_s):
    """Row i of the inverse below its diagonal; X holds −L from row i on, the inverse above."""
    row = tl.sum(tl.where(o_s[:, None] == i, X, 0.0), 0)
    row += tl.sum(row[:, None] * X, 0)
    return tl.where(o_s[:, None] == i, row[None, :], X)


@triton.jit
def mul(x, y, PREC: tl.constexpr):
    """x y in float32: with PREC "tf32x3", as three tf32 products, about float32's own accuracy."""
    return tl.dot(x, y, input_precision=PREC)


@triton.jit
def invert(L00, L10, L11, L20, L21, L22, L30, L31, L32, L33, PREC: tl.constexpr):
    """The ten blocks of (I + L)⁻¹; of L00, L11, L22, L33 only the strictly lower part is used."""
    o_s = tl.arange(0, 16)
    lower = o_s[:, None] > o_s[None, :]
    one = tl.where(o_s[:, None] == o_s[None, :], 1.0, 0.0)
    X00 = tl.where(lower, -L00, 0.0)
    X11 = tl.where(lower, -L11, 0.0)
    X22 = tl.where(lower, -L22, 0.0)
    X33 = tl.where(lower, -L33, 0.0)
    for i in range(2, 16):
        X00 = _substitute(i, X00, o_s)
        X11 = _substitute(i, X11, o_s)
        X22 = _substitute(i, X22, o_s)
        X33 = _substitute(i, X33, o_s)
    X00 += one
    X11 += one
    X22 += one
    X33 += one
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
def _store_row(p, o_t, left, X0, X1, X2, X3):
    """Four blocks side by side."""
    type = p.dtype.element_ty
    m = o_t[:, None] < left
    tl.store(p, X0.to(type), mask=m)
    tl.store(p + 16, X1.to(type), mask=m)
    tl.store(p + 32, X2.to(type), mask=m)
    tl.store(p + 48, X3.to(type), mask=m)
