"""The inverse of a unit lower-triangular 64 × 64 matrix, in float32.

(I + L)⁻¹ by halves. The four 16 × 16 blocks on the diagonal by forward substitution, row by row
(stable whatever the size of L's entries, which a product of powers of L is not); then twice

    (A 0; B C)⁻¹ = (A⁻¹ 0; −C⁻¹ B A⁻¹  C⁻¹),

for blocks of 32 and of 64. All but the lower left quarter goes through a scratch of 8 KiB a
program, which stays in the cache: a thread of the substitution keeps whole columns of X and reads
the entries of L that it multiplies them by, so that no row has to be picked out of registers.
"""

import triton
import triton.language as tl

SCRATCH = tl.constexpr(2048)  # float32 numbers a program


@triton.jit
def _rows(p, column, X, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """X, the first FIRST rows of (I + L)⁻¹, and COUNT more; p: L in each column's block.

    The loop stays one up to the machine code: unrolled before, these few lines took most of the
    time that a kernel around them needs to compile.
    """
    more = ()
    for _ in tl.static_range(COUNT):
        more = more + (tl.zeros([64], tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    for i in range(COUNT):
        row = tl.where(column == FIRST + i, 1.0, 0.0)  # [64]
        p_i = p + (FIRST + i) * 32
        for j in tl.static_range(FIRST):
            row -= tl.load(p_i + j) * X[j]
        for j in tl.static_range(COUNT - 1):
            row -= tl.load(p_i + (FIRST + j)) * more[j]  # 0 where that row is not made yet
        after = ()
        for j in tl.static_range(COUNT):
            after = after + (tl.where(i == j, row, more[j]),)  # type: ignore[assignment]  # noqa: RUF005
        more = after
    return X + more


@triton.jit
def _substitute(p):
    """The four [16, 16] blocks on the diagonals of the two [32, 32] at p: from L (its strictly
    lower part, the rest being finite) to (I + L)⁻¹, in place."""
    o_s = tl.arange(0, 64)
    column = o_s % 16
    p_b = p + o_s // 32 * 1024 + o_s // 16 % 2 * (16 * 33)  # the block of each of 4 × 16 columns
    X = _rows(p_b, column, (), 0, 4)  # rows, [64] each: one of every block
    X = _rows(p_b, column, X, 4, 4)
    X = _rows(p_b, column, X, 8, 4)
    X = _rows(p_b, column, X, 12, 4)
    tl.debug_barrier()  # every thread has read L
    for i in tl.static_range(0, 16):
        tl.store(p_b + i * 32 + column, X[i])
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
def invert(L00, L10, L11, scratch, PREC: tl.constexpr):
    """The three [32, 32] blocks of (I + L)⁻¹; of L00 and L11 only the strictly lower part counts.

    scratch: `SCRATCH` numbers of this program's own.
    """
    o_s = tl.arange(0, 32)
    o_b = tl.arange(0, 16)
    p = scratch + o_s[:, None] * 32 + o_s[None, :]
    made = o_s[:, None] // 16 >= o_s[None, :] // 16  # all but the upper right quarter, which is 0
    tl.store(p, L00, mask=made)
    tl.store(p + 1024, L11, mask=made)
    tl.debug_barrier()
    _substitute(scratch)
    for i in tl.range(0, 2, num_stages=1):
        p_b = scratch + i * 1024 + o_b[:, None] * 32 + o_b[None, :]
        B = mul(tl.load(p_b + 16 * 32), tl.load(p_b), PREC)  # [16, 16], as the next
        B = -mul(tl.load(p_b + 16 * 33), B, PREC)
        tl.debug_barrier()  # every thread has read what it takes the place of
        tl.store(p_b + 16 * 32, B)
    tl.debug_barrier()
    X00 = tl.load(p, mask=made, other=0.0)
    X11 = tl.load(p + 1024, mask=made, other=0.0)
    X10 = -mul(X11, mul(L10, X00, PREC), PREC)  # [32, 32] [32, 32]
    return X00, X10, X11


@triton.jit
def store_blocks(p, stride, left, X):
    """Write the lower blocks X, and zeros above them, as a [64, 64] tile with the given row stride;
    rows ≥ left are not written."""
    X00, X10, X11 = X
    o_s = tl.arange(0, 32)
    type = p.dtype.element_ty
    p = p + o_s[:, None] * stride + o_s[None, :]
    m_0, m_1 = o_s[:, None] < left, o_s[:, None] + 32 < left
    tl.store(p, X00.to(type), mask=m_0)
    tl.store(p + 32, tl.zeros([32, 32], type), mask=m_0)
    tl.store(p + 32 * stride, X10.to(type), mask=m_1)
    tl.store(p + 32 * stride + 32, X11.to(type), mask=m_1)


@triton.jit
def store_transposed_blocks(p, stride, left, X):
    """Write the transpose of the same tile."""
    X00, X10, X11 = X
    o_s = tl.arange(0, 32)
    type = p.dtype.element_ty
    p = p + o_s[None, :] * stride + o_s[:, None]
    m_0, m_1 = o_s[None, :] < left, o_s[None, :] + 32 < left
    tl.store(p, X00.to(type), mask=m_0)
    tl.store(p + 32, X10.to(type), mask=m_0)
    tl.store(p + 32 * stride, tl.zeros([32, 32], type), mask=m_1)
    tl.store(p + 32 * stride + 32, X11.to(type), mask=m_1)
