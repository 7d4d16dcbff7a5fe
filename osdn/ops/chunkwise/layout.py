"""Sequences cut into chunks of C tokens, ordered by step: one layout for batches and cu_seqlens.

Step j holds chunk j of every sequence that has one. Sequences are taken longest first, so that the
ones still running at a step are the first rows of the recurrent state. A row is one sequence and
head; a chunk of a row is a [C, D] matrix. The last chunk of a sequence is filled up with padding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from osdn.ops.packing import remember

# 32 and not 64: fewer operations a token at K = V = 64 (docs/log/2026-11-23-chunkwise.md).
LARGEST_CHUNK, SMALLEST_CHUNK = 32, 8


class Layout:
    """Where the chunks of equal-length sequences lie; see the module.

    Tokens are [B, T, H, D] (or [B, T, H], as D = 1 squeezed); rows of chunks are [R, C, D].
    active[j] is the number of sequences at step j. No gather: a chunk is a slice of the time axis.
    """

    def __init__(self, B: int, T: int, H: int) -> None:
        self.T, self.H, self.C = T, H, chunk_size(T)
        self.active = [B] * -(-T // self.C)

    def groups(self, rows: int) -> list[tuple[int, int]]:
        """Ranges of steps [i, j) that together hold at most `rows` rows, or one step."""
        bounds, held = [0], 0
        for j, n in enumerate(self.active):
            if held and held + n * self.H > rows:
                bounds.append(j)
                held = 0
            held += n * self.H
        return list(zip(bounds, [*bounds[1:], len(self.active)]))

    def sizes(self, i: int, j: int) -> list[int]:
        """The number of rows of each step of [i, j)."""
        return [n * self.H for n in self.active[i:j]]

    def rows(self, i: int, j: int) -> slice:
        """Where the rows of steps [i, j) lie among those of all steps."""
        first = sum(self.active[:i]) * self.H
        return slice(first, first + sum(self.sizes(i, j)))

    def load(self, x: Tensor, i: int, j: int, dtype: torch.dtype) -> Tensor:
        """The chunks of steps [i, j) of tokens x, contiguous, in dtype; padding becomes 0."""
        out = x.new_empty(sum(self.sizes(i, j)), self.C, *x.shape[3:], dtype=dtype)
        return self.load_into(out, x, i, j)

    def load_into(self, out: Tensor, x: Tensor, i: int, j: int) -> Tensor:
        """The same into `out` [R, C, ...], which is returned."""
        C, steps_of = self.C, out.unflatten(0, (j - i, self.active[0], self.H))
        for steps, tokens, width in self._pieces(i, j):
            into = steps_of[steps]  # [n, B, H, C, ...], n steps of one width
            if width < C:
                # Padding of zeros changes neither S nor d (β = 0, k = 0, log γ = 0).
                into.zero_()
            # [B, n·width, H, ...] to [n, B, H, width, ...], as a view; the copy casts as well.
            chunks = (
                x[:, tokens].unflatten(1, (-1, width)).permute(1, 0, 3, 2, *range(4, x.ndim + 1))
            )
            into[:, :, :, :width].copy_(chunks)
        return out

    def store(self, chunks: Tensor, x: Tensor, i: int, j: int) -> None:
        """The converse of load: write the tokens of steps [i, j) into x."""
        B, C, H, rest = self.active[0], self.C, self.H, x.shape[3:]
        chunks = chunks.view(j - i, B, H, C, *rest)
        for steps, tokens, width in self._pieces(i, j):
            into = x[:, tokens].unflatten(1, (-1, width))
            into.copy_(chunks[steps][:, :, :, :width].permute(1, 0, 3, 2, *range(4, x.ndim + 1)))

    def _pieces(self, i: int, j: int) -> Iterator[tuple[slice, slice, int]]:
        """Steps (from i), their tokens and tokens a chunk: the whole chunks, then a part of one."""
        whole = min(j, self.T // self.C)
        if whole > i:
            yield slice(0, whole - i), slice(i * self.C, whole * self.C), self.C
        if j > whole:
            yield slice(whole - i, None), slice(whole * self.C, None), self.T - whole * self.C

    def sort(self, per_sequence: Tensor) -> Tensor:
        """[N, H, ...] in the order of the rows, as a new tensor [N·H, ...]."""
        return per_sequence.flatten(0, 1).clone()

    def unsort(self, rows: Tensor) -> Tensor:
        """The converse of sort."""
        return rows.unflatten(0, (-1, self.H))


class RaggedLayout(Layout):
    """Where the chunks of the sequences between cu_seqlens lie; tokens are [1, T, H, ...]."""

    def __init__(self, cu_seqlens: Tensor, T: int, H: int) -> None:
        self.T, self.H, self.C = T, H, chunk_size(T // (len(cu_seqlens) - 1))
        device, C = cu_seqlens.device, self.C
        offsets = cu_seqlens.cpu().long()  # all here is made there, whatever the default device
        lengths = offsets.diff()
        # Longest first: the sequences that are still running are then the first rows.
        order = lengths.argsort(descending=True, stable=True)
        chunks = (lengths[order] + C - 1) // C  # [N], falling
        steps = torch.arange(int(chunks[0]), device="cpu")
        # [steps]: how many sequences have more than j chunks
        active = len(chunks) - torch.searchsorted(chunks.flip(0), steps, right=True)
        first = active.cumsum(0) - active  # [steps]: the chunks before step j
        step = steps.repeat_interleave(active)  # [chunks], as are rank and all below
        rank = torch.arange(len(step), device="cpu") - first[step]  # which of the sorted sequences
        # [chunks, C], where each token of a chunk lies in T
        token = (offsets[order][rank] + C * step)[:, None] + torch.arange(C, device="cpu")
        # Past a sequence's end lies the next one's first token: padding, not to be read.
        real = token < offsets[order + 1][rank][:, None]
        slots = real.flatten().nonzero()[:, 0]  # [T], the places that hold a token

        # As Python numbers, to cut by without a synchronization; and tensors for the device.
        self.active: list[int] = active.tolist()
        self.first = [*first.tolist(), len(step)]
        self.first_slot = [0, *real.sum(1).cumsum(0).tolist()]
        self.order, self.inverse = order.to(device), order.argsort().to(device)
        # A place of padding loads some token that exists, and is then set to 0.
        self.token, self.padding = token.clamp(max=T - 1).to(device), ~real.to(device)
        self.slots, self.real_token = slots.to(device), token.flatten()[slots].to(device)

    def load_into(self, out: Tensor, x: Tensor, i: int, j: int) -> Tensor:
        # Chunks of these steps: [b − a, H] rows
        a, b, rest = self.first[i], self.first[j], x.shape[3:]
        tokens = x.reshape(self.T, -1).index_select(0, self.token[a:b].flatten())
        into = out.unflatten(0, (b - a, self.H))
        # [b − a, C, H, ...] to [b − a, H, C, ...]
        into.copy_(tokens.view(b - a, self.C, self.H, *rest).transpose(1, 2))
        # Only where some chunk is not full.
        if self.first_slot[b] - self.first_slot[a] < (b - a) * self.C:
            into.masked_fill_(self.padding[a:b].view(b - a, 1, self.C, *[1] * len(rest)), 0)
        return out

    def store(self, chunks: Tensor, x: Tensor, i: int, j: int) -> None:
        a, b, rest = self.first[i], self.first[j], x.shape[3:]
        # Only places that hold a token are written: padding has no place in x.
        start, stop = self.first_slot[a], self.first_slot[b]
        slots = self.slots[start:stop] - a * self.C
        tokens = chunks.view(b - a, self.H, self.C, *rest).transpose(1, 2).to(x.dtype)
        tokens = tokens.reshape((b - a) * self.C, -1).index_select(0, slots)
        x.view(self.T, -1).index_copy_(0, self.real_token[start:stop], tokens)

    def sort(self, per_sequence: Tensor) -> Tensor:
        return per_sequence.index_select(0, self.order).flatten(0, 1)

    def unsort(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (-1, self.H)).index_select(0, self.inverse)


def first_rows(x: Tensor, sizes: list[int]) -> list[Tensor]:
    """The first rows of x for each step of the given sizes, which are mostly the same."""
    # One view a size, not one a step: steps are many, and nearly all of one size.
    views = {n: x[:n] for n in set(sizes)}
    return [views[n] for n in sizes]


def chunk_size(T: int) -> int:
    """Tokens a chunk of sequences of T: LARGEST_CHUNK, or for short ones the next power of two."""
    C = SMALLEST_CHUNK
    if isinstance(T, torch.SymInt) and torch.compiler.is_exporting():
        # Without a branch: each would bound the lengths that the exported program takes. The
        # factor is 1 up to C tokens, and 2 beyond.
        size: int | torch.SymInt = C
        while C < LARGEST_CHUNK:
            size = size + C * torch.sym_min(1, torch.sym_max(0, T - C))
            C *= 2
        return size  # type: ignore[return-value]
    while min(T, LARGEST_CHUNK) > C:
        C *= 2
    return C


def size_of(tokens: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int]:
    """(tokens a chunk, rows of all chunks together) for tokens [B, T, H, ...].

    With cu_seqlens the rows are a bound that takes no look at the offsets. Chunks are no longer
    than twice the mean sequence (or SMALLEST_CHUNK), which limits what padding adds.
    """
    B, T, H = tokens.shape[:3]
    if cu_seqlens is None:
        C = chunk_size(T)
        return C, B * -(-T // C) * H
    N = len(cu_seqlens) - 1
    C = chunk_size(T // N)
    return C, min(T, T // C + N) * H


def layout_of(tokens: Tensor, cu_seqlens: Tensor | None) -> Layout:
    """The layout of tokens [B, T, H, ...]; one is kept for each cu_seqlens, T and H."""
    B, T, H = tokens.shape[:3]
    if cu_seqlens is None:
        return Layout(B, T, H)
    return remember(cu_seqlens, ("chunkwise layout", T, H), lambda: RaggedLayout(cu_seqlens, T, H))
