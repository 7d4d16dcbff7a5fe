"""One training step of a whole model, beside flash-linear-attention's DeltaNet on the same batch.

Forward, loss over every next token, backward, with parameters in bfloat16, which is what FSDP2's
mixed precision hands to a forward; each model as its own library means it to be used: ours with
every block through `torch.compile` (and once keeping the products' results alone for the backward,
train.activation_checkpointing=selective), FLA's with its fused kernels in eager. The optimiser is
left out: it is the same for both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from osdn import OSDNConfig, OSDNForCausalLM
from osdn.train.blocks import prepare_blocks

Timer = Callable[[dict[str, Callable[[], object]], int], dict[str, tuple[float, float]]]
WIDTH, HEADS, MLP, VOCABULARY = 1024, 8, 2816, 32000  # the 340M model's, at any depth


def model_step(sizes: tuple[int, ...], rounds: int, take_turns: Timer) -> list[dict[str, Any]]:
    """Tokens per second and peak extra memory of a step; sizes: B, T and the number of blocks."""
    B, T, layers = sizes
    torch.manual_seed(0)
    ids = torch.randint(VOCABULARY, (B, T), device="cuda")
    models: dict[str, nn.Module] = {
        "osdn": _osdn(layers, forgetting="none"),
        "osdn, APF": _osdn(layers),
        "osdn, selective": _osdn(layers, forgetting="none", checkpointing="selective"),
        "osdn as DeltaNet": _osdn(layers, mixer="delta_net"),
    }
    peer = _fla_delta_net(layers)
    if peer is not None:
        models["FLA DeltaNet"] = peer

    def step(name: str) -> None:
        models[name](input_ids=ids, labels=ids).loss.backward()
        models[name].zero_grad(set_to_none=True)

    times = take_turns({name: partial(step, name) for name in models}, rounds)
    rows: list[dict[str, Any]] = []
    for name, model in models.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(name)
        torch.cuda.synchronize()
        ms, spread = times[name]
        rows.append({
            "name": name, "B": B, "T": T, "layers": layers, "ms": ms, "spread": spread,
            "tokens_per_s": B * T / ms * 1e3,
            "peak_MiB": (torch.cuda.max_memory_allocated() - before) / 2**20,
            "parameters": sum(p.numel() for p in model.parameters()),
        })  # fmt: skip
    base = rows[-1]["tokens_per_s"]
    print(f"\nmodel step B{B} T{T}, {layers} layers, over {rows[-1]['name']}")
    for row in rows:
        print(
            f"{row['name']:22s} {row['ms']:8.2f} ms (spread {row['spread']:.3f})  "
            f"{row['tokens_per_s']:9.0f} tokens/s {row['tokens_per_s'] / base:5.2f}×  "
            f"MiB {row['peak_MiB']:7.0f}",
            flush=True,
        )
    return rows


def _osdn(
    layers: int, *, checkpointing: Literal["none", "selective"] = "none", **options: Any
) -> nn.Module:
    config = OSDNConfig(
        hidden_size=WIDTH, num_hidden_layers=layers, num_heads=HEADS, intermediate_size=MLP,
        vocab_size=VOCABULARY, **options,
    )  # fmt: skip
    with torch.device("cuda"):
        model = OSDNForCausalLM(config).train()
    model.to(dtype=torch.bfloat16)  # type: ignore[call-arg]  # a decorator hides its signature
    prepare_blocks(model, checkpointing=checkpointing, compile=True)
    return model


def _fla_delta_net(layers: int) -> nn.Module | None:
    """FLA's model of the same sizes, with its fused linear cross-entropy; None where it is not."""
    try:
        from fla.models import DeltaNetConfig, DeltaNetForCausalLM
    except ImportError:
        return None
    config = DeltaNetConfig(
        hidden_size=WIDTH, num_hidden_layers=layers, num_heads=HEADS, intermediate_size=MLP,
        vocab_size=VOCABULARY, fuse_cross_entropy=False, fuse_linear_cross_entropy=True,
    )  # fmt: skip
    with torch.device("cuda"):
        model: nn.Module = DeltaNetForCausalLM(config)
    return model.to(torch.bfloat16).train()
