"""Blocks that keep fewer activations, and compiled blocks; both inside DDP's and FSDP2's hooks."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from osdn.model.modeling import OSDNForCausalLM

aten = torch.ops.aten
# What the selective mode keeps: the results that take long to make for their size.
PRODUCTS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}
MIXERS = ("osdn", "torch_attn")  # whose operators are kept: ours, and variable-length attention


def _keep(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Matrix products and mixers are kept; norms, gates, casts and convolutions recomputed."""
    # By namespace, so that every backend's operator is kept, and one added later too.
    kept = operator in PRODUCTS or getattr(operator, "namespace", None) in MIXERS
    # The convolution is ours as well, and cheap: its backward makes its sums again anyway.
    kept = kept and operator is not torch.ops.osdn.short_convolution.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def prepare_blocks(
    model: OSDNForCausalLM,
    *,
    checkpointing: Literal["none", "selective", "full"],
    compile: bool,
) -> None:
    """Replace every block's forward; parameters, names and hooks stay as they are.

    Compiling block by block compiles one graph for all blocks of a kind, and leaves the
    collectives of FSDP2, which are hooks of the blocks, outside of it.
    """
    # By the attribute: a wrapper module would change the parameters' names.
    for block in model.model.layers:
        forward: Callable[..., Any] = block.forward
        if checkpointing != "none":
            # No dropout, so no random numbers to bring back.
            options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            if checkpointing == "selective":
                options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep)
            forward = partial(_recomputed, block, forward, options)
        # Last, so that what is recomputed is compiled as well.
        if compile:
            forward = torch.compile(forward)
        block.forward = forward


def _recomputed(
    block: nn.Module, forward: Callable[..., Any], options: dict[str, Any], *args: Any, **given: Any
) -> Any:
    # Validation keeps nothing, so there is nothing to recompute.
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args, **given)
    return checkpoint(forward, *args, **options, **given)
