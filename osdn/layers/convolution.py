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
        super().__init__(channels, channels, width, groups=channels, bias=False)
        self.head_dim = head_dim

    def forward(  # type: ignore[override]
        self, x: Tensor, history: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, D] with the W−1 inputs before it, history [B, D, W−1] -> (y, next history).

        With cu_seqlens, no sequence sees its neighbour, and the history returned is of no use.
        """
        gap, first = self.kernel_size[0] - 1, 0
        if history is not None:
            x, first = torch.cat([history.transpose(1, 2).to(x.dtype), x], dim=1), gap
        y = short_convolution(x, self.weight.squeeze(1), cu_seqlens, head_dim=self.head_dim)
        last = F.pad(x[:, max(0, x.shape[1] - gap) :], (0, 0, max(0, gap - x.shape[1]), 0))
        return y[:, first:], last.transpose(1, 2)
