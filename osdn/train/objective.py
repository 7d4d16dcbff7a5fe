"""What is trained: a language model with its loss, as one module for DDP, FSDP2 and autocast."""

import torch
from torch import Tensor, nn
from torch._dynamo import maybe_mark_dynamic

from osdn.data import Batch
from osdn.model.loss import linear_cross_entropy, next_token_labels
from osdn.model.modeling import OSDNForCausalLM


class Objective(nn.Module):
    """The next-token loss of packed rows; no logits are returned.

    Args:
        model: the language model.
        autocast: compute in bfloat16 what torch.autocast says.
        z_loss: see linear_cross_entropy; none in evaluation mode.
    """

    def __init__(self, model: OSDNForCausalLM, *, autocast: bool, z_loss: float) -> None:
        super().__init__()
        self.model, self.autocast, self.z_loss = model, autocast, z_loss

    def forward(
        self, input_ids: Tensor, labels: Tensor, cu_seqlens: Tensor, count: Tensor | float
    ) -> Tensor:
        """Summed loss over count; input_ids, labels [1, T], cu_seqlens [N + 1] -> scalar."""
        # Under FSDP2 the policy casts, and autocast is off: casting twice would cost time.
        kind, dtype = input_ids.device.type, torch.bfloat16 if self.autocast else None
        with torch.autocast(kind, dtype=dtype, enabled=self.autocast):
            # Hidden states [1, T, D]
            outputs = self.model.model(input_ids, use_cache=False, cu_seqlens=cu_seqlens)
            return linear_cross_entropy(
                outputs.last_hidden_state.flatten(0, 1),
                # Not by way of the head's forward: the loss takes its weight in chunks.
                self.model.lm_head.weight,
                next_token_labels(labels, cu_seqlens).flatten(),
                count,
                z_loss=self.z_loss if self.training else 0.0,
            )


def inputs(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A batch's tensors on the device, in the objective's order; nothing waits for the copies."""

    def moved(x: Tensor) -> Tensor:
        # Only from pinned memory does a copy run beside the host.
        host = x.pin_memory() if device.type == "cuda" else x
        return host.to(device, non_blocking=True)

    cu_seqlens = moved(batch.cu_seqlens)
    maybe_mark_dynamic(cu_seqlens, 0)  # as many sequences as there are: no second compilation
    return moved(batch.input_ids), moved(batch.labels), cu_seqlens
