"""Short prompts through a captured graph, by length.

The layers launch some thirty kernels a block, which takes longer than a thousand tokens do on a
GPU. So a prompt is padded on the left to a power of two, which changes nothing (a padding token
leaves every state as it is), and a length that comes a second time is captured: its graph leaves
the states in a step's buffers. The first time, the same padded launches run one by one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from osdn.layers.osdn import OSDN
from osdn.layers.padding import padding_first, reordered
from osdn.model.inputs import padding_masks
from osdn.ops import online_scaled_delta_rule

SHORTEST, MOST_TOKENS = 64, 4096  # of a padded prompt; of a padded batch, past which GPUs are busy
MOST_LENGTHS = 8  # captured at a time for a batch size; the least recently used one goes

Capture = Callable[[Callable[[], None], torch.device], Callable[[], None]]


class Prompt:
    """The forward of `batch` prompts padded to `length` tokens."""

    def __init__(self, batch: int, length: int, device: torch.device):
        # Fixed places: a graph reads the same addresses at every replay.
        self.ids = torch.zeros(batch, length, dtype=torch.int64, device=device)
        self.mask = torch.zeros(batch, length, dtype=torch.bool, device=device)
        self.replay: Callable[[], None] | None = None
        self.uses = 0

    def run(
        self,
        model: Any,
        input_ids: Tensor,
        mask: Tensor | None,
        states: list[Tensor],
        logits: Tensor,
        capture: Capture,
    ) -> None:
        """Fill states (S, d, the histories of q and k and of v, of each layer) and logits [B, ·].

        input_ids: [B, T].  mask: [B, T] booleans, or None where no token is padding.
        """
        # Tokens at the end of the row, padding in front of them.
        T = input_ids.shape[1]
        self.ids[:, -T:].copy_(input_ids)
        self.mask[:, :-T].fill_(False)
        self.mask[:, -T:].copy_(torch.ones_like(input_ids) if mask is None else mask)
        if mask is not None:  # padding may stand anywhere
            order = padding_first(self.mask, None)
            self.ids.copy_(reordered(self.ids, order))
            self.mask.copy_(reordered(self.mask, order))

        # A capture costs as much as several runs. A length that is used once is not worth it.
        launch = partial(self.launch, model, states, logits)
        self.uses += 1
        if self.uses == 2:
            self.replay = capture(launch, self.ids.device)
        (self.replay or launch)()

    def launch(self, model: Any, states: list[Tensor], logits: Tensor) -> None:
        """The forward of what self.ids and self.mask hold."""
        # [B, length, D], [B, length, 1]
        h, padding = model.model.embeddings(self.ids), ~self.mask[..., None]
        for i, block in enumerate(model.model.layers):
            h, found = forward(block, h, self.mask, padding)
            for state, x in zip(states[4 * i : 4 * i + 4], found):
                # Into the step's buffers: decoding goes on from there.
                state.copy_(x)
        # [B, D] [D, vocabulary]
        torch.mm(model.model.norm(h[:, -1]), model.lm_head.weight.t(), out=logits)


def forward(
    block: Any, h: Tensor, mask: Tensor, padding: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The block's output [B, T, D], and its mixer's states after the last token.

    As OSDNBlock.forward, less the cache and the search for padding, which comes first here.
    """
    mixer: OSDN = block.attn
    n = block.attn_norm(h).masked_fill(padding, 0)
    x = mixer.operands(n, mask)
    o, S, d = online_scaled_delta_rule(
        x.q, x.k, x.v, x.beta, x.log_gamma, log_alpha=x.log_alpha,
        initial_state=x.initial_state, initial_precond=x.initial_precond,
        output_final_state=True, backend=mixer.backend, **mixer.rule,
    )  # fmt: skip
    assert S is not None and d is not None
    o = mixer.o_norm(o).flatten(-2)  # [B, T, H V]
    h = h + mixer.o_proj(o if mixer.g_proj is None else o * F.silu(mixer.g_proj(n)))
    history = x.history
    return h + block.mlp(block.mlp_norm(h)), (S, d, torch.cat(history[:2], dim=1), history[2])


def prompt_mask(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | bool | None:
    """Where these tokens are real [B, T], None where all are; False where the layers must run.

    That is where a row ends with padding, whose logits are asked for. Raises as the model does.
    """
    _, mask = padding_masks(attention_mask, input_ids[..., None])
    return mask if mask is None or bool(mask[:, -1].all()) else False


def padded(batch: int, length: int) -> int | None:
    """What a prompt is padded to, or None where it is long enough to go as it is."""
    # Powers of two, so that few graphs serve all lengths.
    size = max(SHORTEST, 1 << (length - 1).bit_length())
    return size if batch * size <= MOST_TOKENS else None
