"""Next-token cross-entropy that never holds the logits of all tokens at once."""

from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
CHUNK_LOGITS = 2**27  # logits held at a time: 256 MiB in bfloat16


def next_token_labels(labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """labels [B, T] moved one to the left, so that position t holds what t predicts; int64.

    The last position, and the last of every packed sequence, predicts nothing (−100).
    """
    shifted = F.pad(labels[:, 1:].long(), (0, 1), value=IGNORED)  # [B, T]
    if cu_seqlens is not None:
        # A document's last token would predict the next document's first.
        shifted = shifted.index_fill(1, cu_seqlens[1:].long() - 1, IGNORED)
    return shifted


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_items: Tensor | float | None = None,
    *,
    z_loss: float = 0.0,
) -> Tensor:
    """Σ_t −log softmax(W h_t)[label_t] over the labels that are not −100, divided by their number.

    Without any such label the loss is NaN, as that of transformers' models, and its gradient 0.

    Tokens are taken in chunks. Each chunk's part of the gradients is made while its logits are
    there, so that memory does not grow with tokens × vocabulary and no logits are made twice; there
    is no second derivative. The softmax is taken in float32, the gradient of W summed in it.

    Args:
        hidden: [N, D].  weight: [vocabulary, D].  labels: [N] int64.
        num_items: divide by this instead (transformers' Trainer, over accumulated batches).
        z_loss: z_loss · Σ_t log² Z_t is added to the sum, Z_t = Σ_i exp(W h_t)_i, which keeps the
            logits from drifting together (PaLM, arXiv 2204.02311, section 5).

    Raises:
        ValueError: the weight is offloaded, so that there are no values to read.
        RuntimeError: a label is neither −100 nor in the vocabulary.
    """
    if weight.is_meta and not hidden.is_meta:
        raise ValueError(
            "lm_head: its weights are offloaded, and the loss in chunks reads them in place; give "
            "it a device in device_map, or call model.eval() and ask for all logits"
        )
    # Inside the Function autocast is off: the dtype is taken along.
    kind, dtype = hidden.device.type, hidden.dtype
    if _has_autocast(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    # The number of targets is applied outside, so that autograd scales the kept gradients.
    total = _Summed.apply(hidden, weight, labels, z_loss, dtype, torch.is_grad_enabled())
    return _divide(total, labels, num_items)


def cross_entropy(
    logits: Tensor, labels: Tensor, num_items: Tensor | float | None = None
) -> Tensor:
    """The same loss from logits [N, vocabulary] that are there anyway, as in evaluation.

    The float32 copies of its softmax are made for CHUNK_LOGITS logits at a time.
    """
    rows = max(1, CHUNK_LOGITS // logits.shape[-1])  # tokens at a time
    wide = torch.promote_types(logits.dtype, torch.float32)
    losses = [
        F.cross_entropy(some.to(wide), y, ignore_index=IGNORED, reduction="sum")
        for some, y in zip(logits.split(rows), labels.split(rows))
    ]
    return _divide(torch.stack(losses).sum(), labels, num_items)


def _has_autocast(kind: str) -> bool:
    """Of the devices that models run on, only meta has no autocast, and raises when asked for it.

    torch.amp.is_autocast_available would say so, but torch.compile cannot trace it in torch 2.11.
    """
    return kind != "meta"


def _divide(total: Tensor, labels: Tensor, num_items: Tensor | float | None) -> Tensor:
    """total over num_items, or over the number of targets.

    Over 0 the value is NaN or infinity, as in transformers' models, and the gradient is 0. The
    gradient of a plain division is 1/0, which turns the stored zeros of every token into NaN.
    """
    count = (labels != IGNORED).sum() if num_items is None else num_items
    if not isinstance(count, Tensor):
        return total / count if count else 0.0 * total + total.detach() / count
    # where on both sides: its gradient at 0 / 0 is 0 times a finite number.
    some = count != 0
    return torch.where(some, total / torch.where(some, count, 1), total.detach() / count)


class _Summed(torch.autograd.Function):
    """The sum, and the gradients of hidden and weight in the same pass over the chunks."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        z_loss: float,
        dtype: torch.dtype,
        training: bool,
    ) -> Tensor:
        kind = hidden.device.type
        with torch.autocast(kind, enabled=False) if _has_autocast(kind) else nullcontext():
            h_all, w = hidden.to(dtype), weight.to(dtype)  # [N, D], [vocabulary, D]
            rows = max(1, CHUNK_LOGITS // len(weight))
            wide = torch.promote_types(dtype, torch.float32)
            total = torch.zeros((), dtype=wide, device=hidden.device)
            # dw is summed over chunks, so in float32; dh is written once.
            dh, dw = torch.empty_like(h_all), torch.zeros_like(w, dtype=wide)
            score = _compiled_score() if hidden.is_cuda else _score
            for start in range(0, len(labels), rows):
                h, y = h_all[start : start + rows], labels[start : start + rows]
                loss, dlogits = score(h @ w.T, y, z_loss, training)  # [n, D] [D, vocabulary]
                # Not in place: torch 2.11 compiles that into a result without a gradient.
                total = total + loss
                if training:
                    dh[start : start + rows] = dlogits @ w  # [n, vocabulary] [vocabulary, D]
                    dw += dlogits.T @ h  # [vocabulary, n] [n, D]
        if training:
            ctx.save_for_backward(dh, dw)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dh, dw = ctx.saved_tensors
        hidden, weight = ctx.dtypes
        # grad is a scalar: 1 over the targets, times what came from the loss.
        return (dh * grad).to(hidden), (dw * grad).to(weight), None, None, None, None


def _score(logits: Tensor, labels: Tensor, z_loss: float, training: bool) -> tuple[Tensor, Tensor]:
    """(summed loss, in training its gradient in their dtype) of logits [n, vocabulary]."""
    # [n, vocabulary]
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    # log Z without a second pass: any column's logit less its log-probability.
    log_z = logits[:, 0] - log_p[:, 0]
    there = labels != IGNORED
    at = torch.where(there, labels, 0)  # so that any other negative label is an error
    picked = log_p.gather(-1, at[:, None]).squeeze(-1)  # [n]
    loss = torch.where(there, z_loss * log_z.square() - picked, 0.0).sum()
    if not training:
        return loss, logits
    scale = torch.where(there, 1 + 2 * z_loss * log_z, 0.0)
    # softmax − one-hot, and 2 z log Z softmax for the z-loss; no scatter, which does not fuse.
    hit = torch.arange(logits.shape[-1], device=logits.device) == labels[:, None]
    gradient = log_p.exp_().mul_(scale[:, None]).sub_(hit.to(log_p.dtype))
    return loss, gradient.to(logits.dtype)


@cache
def _compiled_score() -> Any:
    """`_score` with its passes over the logits fused, which is most of its time on a GPU."""
    return torch.compile(_score)
