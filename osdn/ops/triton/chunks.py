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


class Chunks(NamedTuple):
    """The cut of one call. Without cu_seqlens, offsets and indices are None.

    sequences: how many there are, or how many segments of them.
    segment: chunks of a segment, or of a whole sequence; not used with cu_seqlens.

    bound: at least the number of chunks.  cu_seqlens [N + 1] int64.
    offsets: [N] int32, number of each sequence's first chunk.
    indices: [bound, 2] int32, (sequence, chunk within it), or (−1, 0) past the last chunk.
    """

    sequences: int
    bound: int
    segment: int
    cu_seqlens: Tensor | None
    offsets: Tensor | None
    indices: Tensor | None


def chunk_bound(B: int, T: int, cu_seqlens: Tensor | None) -> int:
    """The first dimension of a per-chunk tensor."""
    if cu_seqlens is None:
        return B * ((T + CHUNK - 1) // CHUNK)
    return T // CHUNK + cu_seqlens.shape[0] - 1


def cut(B: int, T: int, cu_seqlens: Tensor | None) -> Chunks:
    """The chunks of [B, T] tokens; built on the device, once for each cu_seqlens tensor."""
    if cu_seqlens is None:
        bound = chunk_bound(B, T, None)
        return Chunks(B, bound, bound // B, None, None, None)
    return remember(cu_seqlens, ("triton chunks", T), lambda: _cut_packed(cu_seqlens, T))


def _cut_packed(cu_seqlens: Tensor, T: int) -> Chunks:
    bound = chunk_bound(1, T, cu_seqlens)
    lengths = cu_seqlens.diff()
    ends = ((lengths + CHUNK - 1) // CHUNK).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends])
    number = torch.arange(bound, device=cu_seqlens.device)
    sequence = torch.searchsorted(ends, number, right=True)
    local = number - starts[sequence]
    used = sequence < lengths.numel()
    pairs = torch.stack([torch.where(used, sequence, -1), torch.where(used, local, 0)], 1)
    # A copy always: the tensor itself would never be freed, see `remember`.
    offsets = cu_seqlens.to(torch.int64, copy=True, memory_format=torch.contiguous_format)
    return Chunks(lengths.numel(), bound, bound, offsets, starts[:-1].int(), pairs.int())


def count_segments(B: int, T: int, programs: int, ease: int = 1) -> int:
    """Of a sequence of T tokens, where B of them walk on `programs` programs each; 1: not cut.

    ease: how many times less a step of this walk takes than one of the memory's.
    """
    walk = triton.cdiv(T, CHUNK)
    count = triton.cdiv(walk, max(LEAST, triton.cdiv(B * walk * programs, PROGRAMS)))
    return count if B * programs * ease <= FEW and walk >= LONG * ease else 1


def split(chunks: Chunks, count: int) -> Chunks:
    """Each sequence in `count` segments; sequences without cu_seqlens only."""
    segment = triton.cdiv(chunks.segment, count)
    return chunks._replace(sequences=chunks.sequences * count, segment=segment)


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def tile(size: int) -> int:
    """The power of two, at least 64, that holds a head size.

    Not less: with 32 columns of bfloat16, Triton 3.6 on Hopper made of `memory_kernel` one that
    returned a wrong memory or read out of bounds, whatever the warps and stages.
    """
    return max(64, triton.next_power_of_2(size))


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
