"""How sequences are cut into chunks, and how a program finds its chunk.

A chunk is `CHUNK` consecutive tokens of one sequence. Chunks are numbered through all sequences in
order; per-chunk tensors (states, preconditioners) have that number as their first dimension. With
cu_seqlens the number of chunks depends on data that lives on the GPU, so buffers and grids use the
bound T // CHUNK + N, and programs past the last chunk return at once: no host synchronisation.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from osdn.ops.packing import remember

CHUNK = 64
# A walk over at least LONG chunks is cut into segments where it would run on at most FEW programs,
# so that about PROGRAMS run (two on each of an H100's 132 multiprocessors), of at least LEAST
# chunks each.
LONG, FEW, PROGRAMS, LEAST = 256, 64, 256, 16
# The forward keeps the memory at the start of every SPAN-th chunk of a sequence; `gradients` starts
# there. Measured at 4, 8 and 16 (docs/explanation/kernels.md). Segments consist of whole spans.
SPAN = 8


class Table(NamedTuple):
    """The runs of `size` tokens that sequences are cut into: chunks, or spans of SPAN chunks.

    bound: at least their number.  Without cu_seqlens, offsets and indices are None.
    offsets: [N] int32, number of each sequence's first run.
    indices: [bound, 2] int32, (sequence, run within it), or (−1, 0) past the last run.
    """

    bound: int
    offsets: Tensor | None
    indices: Tensor | None


class Chunks(NamedTuple):
    """The cut of one call: the table of chunks, spread out, and `spans`, that of spans.

    sequences: how many there are, or how many segments of them.
    segment: chunks of a segment, or of a whole sequence; not used with cu_seqlens.
    cu_seqlens: [N + 1] int64, or None.
    """

    sequences: int
    bound: int
    segment: int
    cu_seqlens: Tensor | None
    offsets: Tensor | None
    indices: Tensor | None
    spans: Table


def chunk_bound(B: int, T: int, cu_seqlens: Tensor | None, size: int = CHUNK) -> int:
    """The first dimension of a tensor with an entry for each run of `size` tokens."""
    if cu_seqlens is None:
        return B * ((T + size - 1) // size)
    return T // size + cu_seqlens.shape[0] - 1


def span_bound(B: int, T: int, cu_seqlens: Tensor | None) -> int:
    """The same of a tensor with an entry for each span."""
    return chunk_bound(B, T, cu_seqlens, SPAN * CHUNK)


def cut(B: int, T: int, cu_seqlens: Tensor | None) -> Chunks:
    """The chunks of [B, T] tokens; built on the device, once for each cu_seqlens tensor."""
    if cu_seqlens is None:
        bound = chunk_bound(B, T, None)
        spans = Table(span_bound(B, T, None), None, None)
        return Chunks(B, bound, bound // B, None, None, None, spans)
    return remember(cu_seqlens, ("triton chunks", T, SPAN), lambda: _cut_packed(cu_seqlens, T))


def _cut_packed(cu_seqlens: Tensor, T: int) -> Chunks:
    table, spans = (_tabulate(T, cu_seqlens, size) for size in (CHUNK, SPAN * CHUNK))
    sequences, bound = cu_seqlens.shape[0] - 1, table.bound
    # A copy always: the tensor itself would never be freed, see `remember`.
    offsets = cu_seqlens.to(torch.int64, copy=True, memory_format=torch.contiguous_format)
    return Chunks(sequences, bound, bound, offsets, table.offsets, table.indices, spans)


def _tabulate(T: int, cu_seqlens: Tensor, size: int) -> Table:
    """The runs of `size` tokens of packed sequences."""
    bound = chunk_bound(1, T, cu_seqlens, size)
    lengths = cu_seqlens.diff()
    ends = ((lengths + size - 1) // size).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends])
    number = torch.arange(bound, device=cu_seqlens.device)
    sequence = torch.searchsorted(ends, number, right=True)
    local = number - starts[sequence]
    used = sequence < lengths.numel()
    pairs = torch.stack([torch.where(used, sequence, -1), torch.where(used, local, 0)], 1)
    return Table(bound, starts[:-1].int(), pairs.int())


def count_segments(B: int, T: int, programs: int, ease: int = 1) -> int:
    """Of a sequence of T tokens, where B of them walk on `programs` programs each; 1: not cut.

    ease: how many times less a step of this walk takes than one of the memory's.
    """
    walk = ceil_div(T, CHUNK)
    segment = _whole_spans(max(LEAST, ceil_div(B * walk * programs, PROGRAMS)))
    count = ceil_div(walk, segment)
    return count if B * programs * ease <= FEW and walk >= LONG * ease else 1


def split(chunks: Chunks, count: int) -> Chunks:
    """Each sequence in `count` segments, as `count_segments` found it; not with cu_seqlens."""
    segment = _whole_spans(ceil_div(chunks.segment, count))
    return chunks._replace(sequences=chunks.sequences * count, segment=segment)


def _whole_spans(segment: int) -> int:
    """The least number of chunks, of whole spans, that holds a segment."""
    return ceil_div(segment, SPAN) * SPAN


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def tile(size: int) -> int:
    """The power of two, at least 64, that holds a head size.

    Not less: with 32 columns of bfloat16, Triton 3.6 on Hopper made of `memory_kernel` one that
    returned a wrong memory or read out of bounds, whatever the warps and stages.
    """
    return power_of_two(size, 64)


def ceil_div(a: int, b: int) -> int:
    """⌈a / b⌉; triton.cdiv takes microseconds a call, and a rule makes dozens."""
    return -(-a // b)


def power_of_two(size: int, least: int = 1) -> int:
    """The least power of two that is below neither; triton.next_power_of_2 is as slow."""
    while least < size:  # comparisons alone: a compiler's sizes may be symbols
        least *= 2
    return least


@triton.jit
def locate_chunk(i_c, cu_seqlens, indices, T, BT: tl.constexpr, IS_VARLEN: tl.constexpr):
    """Of chunk number i_c: its first token's row in [0, B·T), int64, and the tokens from there to
    its sequence's end; none if there is no such chunk.
    """
    if IS_VARLEN:
        i_n = tl.load(indices + 2 * i_c)
        i_t = tl.load(indices + 2 * i_c + 1)
        begin = tl.load(cu_seqlens + tl.maximum(i_n, 0)) + i_t.to(tl.int64) * BT
        end = tl.load(cu_seqlens + tl.maximum(i_n, 0) + 1)
        left = tl.where(i_n < 0, 0, end - begin)
    else:
        NT = tl.cdiv(T, BT)
        i_n = i_c // NT
        i_t = i_c % NT
        begin = i_n.to(tl.int64) * T + i_t * BT
        left = (T - i_t * BT).to(tl.int64)
    return begin, left.to(tl.int32)


@triton.jit
def locate_sequence(
    i_n, cu_seqlens, offsets, T, segment, BT: tl.constexpr, IS_VARLEN: tl.constexpr
):
    """Of sequence i_n: its first token's row (int64), its length, its first chunk (int64).

    Without cu_seqlens, sequences are cut into segments of `segment` chunks, numbered in order.
    """
    if IS_VARLEN:
        begin = tl.load(cu_seqlens + i_n)
        length = (tl.load(cu_seqlens + i_n + 1) - begin).to(tl.int32)
        first = tl.load(offsets + i_n).to(tl.int64)
    else:
        NT = tl.cdiv(T, BT)
        NS = tl.cdiv(NT, segment)
        skip = i_n % NS * segment
        begin = (i_n // NS).to(tl.int64) * T + skip * BT
        length = tl.minimum(segment * BT, T - skip * BT).to(tl.int32)
        first = (i_n // NS).to(tl.int64) * NT + skip
    return begin, length, first


@triton.jit
def sequence_of(i_c, indices, T, BT: tl.constexpr, IS_VARLEN: tl.constexpr):
    """The sequence of chunk number i_c, which there must be."""
    if IS_VARLEN:
        i_n = tl.load(indices + 2 * i_c)
    else:
        i_n = i_c // tl.cdiv(T, BT)
    return i_n


@triton.jit
def load_tile(p, o_r, rows, stride, o_c, cols):
    """The tile p[o_r · stride + o_c], zero where o_r ≥ rows or o_c ≥ cols."""
    mask = (o_r[:, None] < rows) & (o_c[None, :] < cols)
    return tl.load(p + o_r[:, None] * stride + o_c[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(p, value, o_r, rows, stride, o_c, cols):
    """Write a tile as `load_tile` reads one, in the pointer's dtype."""
    mask = (o_r[:, None] < rows) & (o_c[None, :] < cols)
    value = value.to(p.dtype.element_ty)
    tl.store(p + o_r[:, None] * stride + o_c[None, :], value, mask=mask)


@triton.jit
def load_transposed(p, o_c, cols, stride, o_r, rows):
    """The transpose of a tile in memory, [columns o_c, rows o_r]; zero where there is none."""
    mask = (o_c[:, None] < cols) & (o_r[None, :] < rows)
    return tl.load(p + o_r[None, :] * stride + o_c[:, None], mask=mask, other=0.0)


@triton.jit
def store_transposed(p, value, o_c, cols, stride, o_r, rows):
    """Write a tile as `load_transposed` reads one, in the pointer's dtype."""
    mask = (o_c[:, None] < cols) & (o_r[None, :] < rows)
    tl.store(p + o_r[None, :] * stride + o_c[:, None], value.to(p.dtype.element_ty), mask=mask)
