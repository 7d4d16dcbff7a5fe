"""Short prompts through a captured graph, by length.

The layers launch some thirty kernels a block, which takes longer than a thousand tokens do on a
GPU. So a prompt is padded on the left to a power of two, which changes nothing (a padding token
leaves every state as it is), and a length that comes a second time is captured: its graph leaves
the states in a step's buffers. The first time, the same padded launches run one by one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from osdn.model.cache import OSDNCache

SHORTEST, MOST_TOKENS = 64, 4096  # of a padded prompt; of a padded batch, past which GPUs are busy
MOST_LENGTHS = 8  # captured at a time for a batch size; the least recently used one goes


class Prompt:
    """The forward of `batch` prompts padded to `length` tokens.

    finish(cache, hidden [B, D]): takes the states and the last hidden states, on the device.
    """

    def __init__(self, batch: int, length: int, device: torch.device):
        self.ids = torch.zeros(batch, length, dtype=torch.int64, device=device)
        self.mask = torch.zeros(batch, length, dtype=torch.bool, device=device)
        self.replay: Callable[[], None] | None = None
        self.uses = 0

    def run(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        finish: Callable[[OSDNCache, Tensor], None],
        capture: Callable[[Callable[[], None], torch.device], Callable[[], None]],
    ) -> None:
        T = input_ids.shape[1]
        self.mask.zero_()
        self.ids[:, -T:].copy_(input_ids)
        if attention_mask is None:
            self.mask[:, -T:].fill_(True)
        else:
            self.mask[:, -T:].copy_(attention_mask)

        def launch() -> None:
            cache, hidden = OSDNCache(model.config), model.model.embeddings(self.ids)
            for block in model.model.layers:
                hidden = block(hidden, self.mask, cache, True)
            finish(cache, hidden[:, -1])

        self.uses += 1
        if self.uses == 2:
            self.replay = capture(launch, self.ids.device)
        (self.replay or launch)()


def padded(batch: int, length: int) -> int | None:
    """What a prompt is padded to, or None where it is long enough to go as it is."""
    size = max(SHORTEST, 1 << (length - 1).bit_length())
    return size if batch * size <= MOST_TOKENS else None
