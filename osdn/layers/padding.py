"""Padding anywhere in a row: the tokens of each row, reordered so that its padding comes first.

A short convolution reads the tokens before a token, and these must be real ones. With all padding
in front, what a row reads is its own real tokens, and what lies before them counts as zero.
"""

import torch
from torch import Tensor


def padding_first(mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[B, T] int64: where each row's tokens come from, padding first, else in their order.

    mask: [B, T] booleans, False where a token is padding.
    cu_seqlens: offsets of packed sequences; padding moves to the front of its own sequence.
    """
    key = mask.long()  # 0 for padding, 1 for real
    if cu_seqlens is not None:
        time = torch.arange(mask.shape[1], device=mask.device)
        # The sequence first, padding within it.
        key = key + 2 * torch.searchsorted(cu_seqlens[1:].contiguous(), time, right=True)
    # Stable: real tokens keep their order.
    return key.argsort(dim=1, stable=True)


def reordered(x: Tensor, order: Tensor) -> Tensor:
    """x [B, T, ...] with token order[b, t] at place t of row b."""
    index = order.view(*order.shape, *[1] * (x.ndim - 2))
    return x.gather(1, index.expand_as(x))
