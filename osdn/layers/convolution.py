"""The short convolution as a layer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osdn.ops.convolution import short_convolution


class ShortConvolution(nn.Conv1d):
    """Causal depthwise convolution over time, then SiLU and, with head_dim, each head's norm.

    Weight [D, 1, W], no bias; what lies before a sequence's start counts as zero. The equation is
    osdn.ops.convolution.short_convolution's.
    """

    def __init__(self, channels: int, width: int, head_dim: int | None = None):
        # A Conv1d by class, so that weights have FLA's names and shape; its forward is ours.
        super().__init__(channels, channels, width, groups=channels, bias=False)
        self.head_dim = head_dim

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        history: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, D] with the W−1 inputs before it, history [B, D, W−1] -> (y, next history).

        cu_seqlens: no sequence sees its neighbour, and the history returned is of no use.
        padding: [B] int64, how many tokens of zeros each row of x starts with; the history lies
            between these and the row's other tokens.
        """
        gap, first = self.kernel_size[0] - 1, 0
        if history is not None:
            # [B, W−1 + T, D]
            x, first = _after(history.transpose(1, 2).to(x.dtype), x, padding), gap
        # Of the history's places too, which are then dropped.
        y = short_convolution(x, self.weight.squeeze(1), cu_seqlens, head_dim=self.head_dim)
        return y[:, first:], last_inputs(x, gap)


def _after(history: Tensor, x: Tensor, padding: Tensor | None) -> Tensor:
    """[B, W−1 + T, D]: the history [B, W−1, D], behind each row's padding, and then its tokens."""
    # No row has padding in front, so that the history simply comes first.
    if padding is None:
        return torch.cat([history, x], dim=1)
    at = padding[:, None] + torch.arange(history.shape[1], device=x.device)  # [B, W−1]
    x = F.pad(x, (0, 0, history.shape[1], 0))  # [B, W−1 + T, D], zeros in front
    # Right before each row's first real token, over zeros: of the room made or of padding.
    return x.scatter(1, at[..., None].expand_as(history), history)


def last_inputs(x: Tensor, gap: int) -> Tensor:
    """[B, D, gap]: the last tokens of x [B, T, D], zeros before them where T is smaller."""
    T = x.shape[1]
    if torch.compiler.is_compiling():  # no guard on T; an unused copy is never made
        return F.pad(x, (0, 0, gap, 0))[:, T:].transpose(1, 2)
    return F.pad(x[:, max(0, T - gap) :], (0, 0, max(0, gap - T), 0)).transpose(1, 2)
