"""What the preconditioners do on the rows of a step: measured on the way, nothing when off."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from osdn.layers import OSDN, l2_normalize
from osdn.model.modeling import OSDNForCausalLM
from osdn.ops import chunkwise
from osdn.ops.rule import Rule

Measured = dict[str, list[float | None]]  # None: not finite


@contextmanager
def measured(model: OSDNForCausalLM) -> Iterator[Callable[[], Measured]]:
    """While open, every block's forward measures its osdn or delta_net layer.

    Yields a function that gives, after one forward, a list by layer (attention layers left out) of

        dot      mean ⟨d_t, s_t⟩ over tokens and heads: 1 where a write of β = 1 leaves no error
        beta_dot mean β_t ⟨d_t, s_t⟩: above 2 a write expands what it should erase
        clipped  share of the entries of d_t that lie on the box; 0 without one

    The numbers are read from the device when it is called.
    """
    found: dict[int, Tensor] = {}
    hooks = []
    for i, block in enumerate(model.model.layers):
        if isinstance(block.attn, OSDN):
            hook = _Hook(found, i)
            hooks.append(block.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield lambda: _by_name(found)
    finally:
        for handle in hooks:
            handle.remove()


def _by_name(found: dict[int, Tensor]) -> Measured:
    rows = torch.stack([found[i] for i in sorted(found)]).tolist() if found else []
    names = ("dot", "beta_dot", "clipped")
    return {
        name: [row[n] if math.isfinite(row[n]) else None for row in rows]
        for n, name in enumerate(names)
    }


class _Hook:
    """Runs before a block's forward and after FSDP2 has gathered its parameters."""

    def __init__(self, found: dict[int, Tensor], layer: int) -> None:
        self.found, self.layer = found, layer

    @torch.no_grad()
    def __call__(self, block: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        hidden = block.attn_norm(args[0])  # type: ignore[operator]
        self.found[self.layer] = measure(block.attn, hidden, given["cu_seqlens"])  # type: ignore[arg-type]


def measure(layer: OSDN, hidden_states: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[dot, beta_dot, clipped] of one layer on hidden_states [1, T, D], float32 [3].

    d comes from the chunkwise backend, exact with and without the box, whatever backend trains.
    """
    x, _ = layer.k_conv1d(layer.k_proj(hidden_states), None, cu_seqlens)
    k = l2_normalize(x.unflatten(-1, (layer.num_heads, -1))).float()
    beta, log_gamma = layer.gates(hidden_states)
    sequences = len(k) if cu_seqlens is None else len(cu_seqlens) - 1
    options = {"beta_aware": False, "precond_min": None, "precond_max": None, **layer.rule}
    rule, start = Rule(scale=1.0, **options), layer.start_precond()
    d0 = torch.ones_like(k[0, 0]) if start is None else start.float()
    d0 = d0.expand(sequences, *d0.shape).contiguous()
    if rule.constant_precond(log_gamma is not None):
        d = d0[0]
    else:
        one_value = k[..., :1].contiguous()  # the memory's values do not matter to d
        S0 = k.new_zeros(sequences, *k.shape[2:], 1)
        gates = (beta.contiguous(), None if log_gamma is None else log_gamma.contiguous())
        # What it saves for its backward holds the path of d, third (chunkwise.saved_like).
        saved = chunkwise.forward(k, k, one_value, *gates, S0, d0, cu_seqlens, rule, True)[3]
        d = saved[2]
        assert d.shape == k.shape
    dot = (d * k.square()).sum(-1)
    clipped = torch.zeros_like(d)
    if rule.precond_min is not None and rule.precond_max is not None:
        clipped = ((d <= rule.precond_min) | (d >= rule.precond_max)).float()
    return torch.stack([dot.mean(), (beta * dot).mean(), clipped.mean()])
