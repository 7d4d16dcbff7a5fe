"""Next-token cross-entropy that never holds the logits of all tokens at once."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100
CHUNK_LOGITS = 2**26  # logits held at a time: 256 MiB in float32


def next_token_labels(labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """labels [B, T] moved one to the left, so that position t holds what t predicts; int64.

    The last position, and the last of every packed sequence, predicts nothing (−100).
    """
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if cu_seqlens is not None:
        shifted = shifted.index_fill(1, cu_seqlens[1:].long() - 1, IGNORED)
    return shifted


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, num_items: Tensor | int | None = None
) -> Tensor:
    """Σ_t −log softmax(W h_t)[label_t] over the labels that are not −100, divided by their number.

    Tokens are taken in chunks whose logits are recomputed in the backward, so that memory does not
    grow with tokens × vocabulary. The logits' softmax is taken in float32.

    Args:
        hidden: [N, D].  weight: [vocabulary, D].  labels: [N] int64.
        num_items: divide by this instead (transformers' Trainer, over accumulated batches).
    """

    def summed(h: Tensor, y: Tensor) -> Tensor:
        logits = F.linear(h, weight).float()
        return F.cross_entropy(logits, y, ignore_index=IGNORED, reduction="sum")

    rows = max(1, CHUNK_LOGITS // len(weight))
    pieces = list(zip(hidden.split(rows), labels.split(rows)))
    if len(pieces) == 1:
        total = summed(*pieces[0])
    else:
        losses = [checkpoint(summed, h, y, use_reentrant=False) for h, y in pieces]
        total = torch.stack(losses).sum()
    count = (labels != IGNORED).sum() if num_items is None else num_items
    return total / count
