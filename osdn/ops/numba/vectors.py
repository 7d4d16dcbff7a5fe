"""Vectors for numba: loops that say what stays in registers, instead of hoping for a vectoriser.

numba hands scalar loops to LLVM's vectoriser, which gives up on the recurrence's since it cannot
tell the arrays apart: 2.1 µs a token at K = V = 64, against 0.24 with the operations below, each an
LLVM instruction over a whole vector (docs/log/2026-11-23-numba.md). No fast-math: a NaN stays one,
and bits do not depend on where a loop is inlined. Arrays are flat, contiguous, float32 or float64;
indices are not checked.
"""

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, njit, types
from numba.core import cgutils
from numba.core.datamodel import models

intrinsic: Any = extending.intrinsic  # numba's annotation is of the emitter, not of what it makes
BYTES = 128  # a vector: two registers with AVX-512, four with AVX2, eight with NEON
AHEAD = 2  # tokens between asking for a row and using it
BLOCK = 128  # tokens that one head goes through before the next head does


class Vector(types.Type):
    """As many numbers of one dtype as fill BYTES, in registers: load, store, spread, fma below."""

    def __init__(self, dtype):
        self.dtype, self.lanes = dtype, BYTES * 8 // dtype.bitwidth  # 32 of float32, 16 of float64
        scalar = ir.FloatType() if dtype.bitwidth == 32 else ir.DoubleType()
        self.llvm = ir.VectorType(scalar, self.lanes)
        super().__init__(name=f"Vector({dtype}x{self.lanes})")

    def cast(self, context, builder, kind, x):
        """x as a vector: itself, or the number converted and put in every lane."""
        if isinstance(kind, Vector):
            return x
        # How LLVM says "the same number in every lane": into lane 0, then shuffled everywhere.
        x, empty = context.cast(builder, x, kind, self.dtype), ir.Constant(self.llvm, ir.Undefined)
        first = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), None)
        return builder.shuffle_vector(builder.insert_element(empty, x, first.type.element(0)),
                                      empty, first)  # fmt: skip


@extending.register_model(Vector)
class VectorModel(models.PrimitiveModel):
    """numba's representation of a Vector: LLVM's vector."""

    def __init__(self, manager, vector):
        super().__init__(manager, vector, vector.llvm)


# No bounds check, and no wrap for negative indices: this is the inner loop.
def _address(context, builder, kind, args, pointee):
    """The address of array[index], typed; args are the array, the index and more."""
    data = context.make_array(kind)(context, builder, args[0]).data
    return builder.bitcast(builder.gep(data, [args[1]]), pointee.as_pointer())


@intrinsic
def lanes(typing, array):
    """The lanes of a vector of the array's dtype: a constant."""
    return types.intp(array), lambda context, builder, sig, args: ir.IntType(64)(
        Vector(array.dtype).lanes
    )


@intrinsic
def zeros(typing, array):
    """A vector of zeros in the array's dtype."""
    vector = Vector(array.dtype)
    return vector(array), lambda context, builder, sig, args: vector.llvm(None)


@intrinsic
def load_all(typing, array, index):
    """A whole vector from array[index] on."""
    vector = Vector(array.dtype)

    def emit(context, builder, sig, args):
        # Aligned to a number, not to a vector: rows of K numbers begin anywhere.
        address = _address(context, builder, array, args, vector.llvm)
        return builder.load(address, align=array.dtype.bitwidth // 8)

    return vector(array, types.intp), emit


@intrinsic
def store_all(typing, array, index, x):
    """A whole vector to array[index] on."""

    def emit(context, builder, sig, args):
        address = _address(context, builder, array, args, x.llvm)
        builder.store(args[2], address, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, x), emit


@intrinsic
def load_some(typing, array, index, count):
    """`count` numbers from array[index] on, zeros in the other lanes."""
    vector = Vector(array.dtype)

    def emit(context, builder, sig, args):
        # Through a slot on the stack, whose other lanes are zero already.
        slot = cgutils.alloca_once_value(builder, vector.llvm(None))
        builder.store(vector.llvm(None), slot)
        address = _address(context, builder, array, args, vector.llvm)
        cgutils.raw_memcpy(builder, slot, address, args[2], array.dtype.bitwidth // 8)
        return builder.load(slot)

    return vector(array, types.intp, types.intp), emit


@intrinsic
def store_some(typing, array, index, x, count):
    """The first `count` lanes to array[index] on."""

    def emit(context, builder, sig, args):
        slot = cgutils.alloca_once(builder, x.llvm)
        builder.store(args[2], slot)
        address = _address(context, builder, array, args, x.llvm)
        cgutils.raw_memcpy(builder, address, slot, args[3], array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, x, types.intp), emit


@intrinsic
def spread(typing, array, index):
    """array[index] in every lane."""
    vector = Vector(array.dtype)

    def emit(context, builder, sig, args):
        x = builder.load(_address(context, builder, array, args, vector.llvm.element))
        return vector.cast(context, builder, array.dtype, x)

    return vector(array, types.intp), emit


@intrinsic
def prefetch(typing, array, index):
    """Ask for the cache line of array[index], which may lie outside of the array."""

    def emit(context, builder, sig, args):
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte] + [number] * 3)
        # A hint: it reads nothing and cannot fault, so a row past the end may be asked for.
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        address = _address(context, builder, array, args, ir.IntType(8))
        builder.call(function, [address, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), emit


def _lanewise(arguments, combine):
    """Signature and code of an operation on vectors; a number stands for a vector of it."""
    vector = next(x for x in arguments if isinstance(x, Vector))

    def emit(context, builder, sig, args):
        return combine(
            builder, vector, *(vector.cast(context, builder, *x) for x in zip(sig.args, args))
        )

    return vector(*arguments), emit


@intrinsic
def fma(typing, a, b, c):
    """a b + c, rounded once where the machine has an instruction for it."""

    def combine(builder, vector, *abc):
        # fmuladd and not fma: on a machine without the instruction fma is a call a lane.
        name = f"llvm.fmuladd.v{vector.lanes}f{vector.dtype.bitwidth}"
        kind = ir.FunctionType(vector.llvm, [vector.llvm] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), abc)

    return _lanewise((a, b, c), combine)


@intrinsic
def choose(typing, u, low, high, below, within, above):
    """below where u < low, above where u > high, within elsewhere (a NaN is within)."""

    def combine(builder, vector, u, low, high, below, within, above):
        # Ordered comparisons are false for a NaN, which thus passes as it is.
        capped = builder.select(builder.fcmp_ordered(">", u, high), above, within)
        return builder.select(builder.fcmp_ordered("<", u, low), below, capped)

    return _lanewise((u, low, high, below, within, above), combine)


@intrinsic
def total(typing, x):
    """The sum of the lanes, by halves."""

    def emit(context, builder, sig, args):
        (y,), count = args, x.lanes
        # By halves, and not from left to right: shorter chains, and a smaller rounding error.
        while count > 1:
            count //= 2
            kind = ir.VectorType(ir.IntType(32), count)
            low, high = (kind([*range(at, at + count)]) for at in (0, count))
            low, high = (builder.shuffle_vector(y, y, half) for half in (low, high))
            y = builder.fadd(low, high)
        return builder.extract_element(y, ir.IntType(32)(0))

    return x.dtype(x), emit


# error_model "numpy": no check for a division by zero in the loops.
inlined = njit(nogil=True, error_model="numpy")


def entry(function):
    """Compile what Python calls, and keep the machine code in numba's cache where that is writable.

    The cache compares the text of the function's own file alone, so the text of all files that its
    machine code comes from goes into its name.
    """
    text = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    # numba names its cache files after this.
    function.__qualname__ += "_" + hashlib.sha256(text).hexdigest()[:16]
    try:
        compiled: Any = njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # numba found no directory to write to: compile in every process
        return inlined(function)
    cache = compiled._cache
    save, load = cache.save_overload, cache.load_overload

    def load_if_sound(signature, target):
        try:
            return load(signature, target)
        except Exception:  # unpickling a damaged file may raise anything
            with suppress(OSError):
                cache.flush()  # an empty index; what is compiled now is written over the rest
            return None

    def save_if_there_is_room(signature, data):
        with suppress(OSError):  # a full disk; this process has the machine code all the same
            save(signature, data)

    cache.load_overload = load_if_sound
    cache.save_overload = save_if_there_is_room
    return compiled


@inlined
def load(array, index, count):
    """A vector from array[index] on; past `count` numbers, zeros."""
    return load_all(array, index) if count >= lanes(array) else load_some(array, index, count)


@inlined
def store(array, index, x, count):
    """x to array[index] on, `count` numbers at most."""
    if count >= lanes(array):
        store_all(array, index, x)
    else:
        store_some(array, index, x, count)


@inlined
def fetch(array, row, size, start, count):
    """Ask for numbers start to start + count of a row ahead of its use, wherever it may lie."""
    for i in range(start, min(start + count, size), 64 // array.itemsize):
        prefetch(array, row * size + i)


@inlined
def scratch(like, rows, columns):
    """Unwritten rows of `columns` numbers padded to whole vectors, aligned to a cache line."""
    W = lanes(like)
    line = 64 // like.itemsize
    # A line more than needed, so that the start can be moved to a line's border.
    array = np.empty(rows * (-(-columns // W) * W) + line, like.dtype)
    skip = (-array.ctypes.data % 64) // like.itemsize
    return array[skip:]
