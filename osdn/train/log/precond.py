"""What the preconditioners do on the rows of a step: measured on the way, nothing when off."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from osdn.layers.osdn import OSDN
from osdn.model.modeling import OSDNForCausalLM
from osdn.ops.operands import Options
from osdn.ops.reference import adapt

TOKENS = 4096  # of the pass that are measured: the definition walks through them one by one

Measured = dict[str, list[float | None]]  # None: not finite


class Keys(NamedTuple):
    """What d depends on in one layer: k [T, H, K], beta, log_gamma [T, H], start [H, K], float32.

    sequences: the offsets of their first tokens.
    """

    k: Tensor
    beta: Tensor
    log_gamma: Tensor | None
    start: Tensor
    rule: Options
    sequences: list[int]


@contextmanager
def measured(model: OSDNForCausalLM) -> Iterator[Callable[[], Measured]]:
    """While open, every block's forward keeps its osdn or delta_net layer's keys and gates.

    Yields a function that gives, after one forward, a list by layer (attention layers left out) of

        dot       mean ⟨d_t, s_t⟩ over tokens and heads: 1 where a write of β = 1 leaves no error
        beta_dot  mean β_t ⟨d_t, s_t⟩: above 2 a write expands what it should erase
        clipped   share of the entries of d_t that lie on the box; 0 without one

    over the pass' first TOKENS tokens. d is the definition's, whatever backend trains.
    """
    found: dict[int, Keys] = {}
    hooks = []
    for i, block in enumerate(model.model.layers):
        if isinstance(block.attn, OSDN):
            # Before the block, with its input: the layer's first half is then run once more.
            hook = _Hook(found, i)
            hooks.append(block.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield lambda: _by_name([found[i] for i in sorted(found)])
    finally:
        for handle in hooks:
            handle.remove()


class _Hook:
    """Runs before a block's forward and after FSDP2 has gathered its parameters."""

    def __init__(self, found: dict[int, Keys], layer: int) -> None:
        self.found, self.layer = found, layer

    @torch.no_grad()
    def __call__(self, block: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        hidden = block.attn_norm(args[0])  # type: ignore[operator]  # [1, T, D]
        self.found[self.layer] = keys(block.attn, hidden, given["cu_seqlens"])  # type: ignore[arg-type]


def keys(layer: OSDN, hidden_states: Tensor, cu_seqlens: Tensor) -> Keys:
    """What the layer makes of the first TOKENS of hidden_states [1, T, D]."""
    # By the layer itself, so that what is measured is what is trained.
    given = layer.operands(hidden_states, cu_seqlens=cu_seqlens)
    k, beta, start = given.k[0, :TOKENS].float(), given.beta[0, :TOKENS], given.initial_precond
    log_gamma = None if given.log_gamma is None else given.log_gamma[0, :TOKENS]
    options = {"beta_aware": False, "precond_min": None, "precond_max": None, **layer.rule}
    start = torch.ones_like(k[0]) if start is None else start.detach().clone().float()
    # where d starts again
    sequences = [first for first in cu_seqlens[:-1].tolist() if first < TOKENS]
    return Keys(k, beta, log_gamma, start, Options(scale=1.0, **options), sequences)


def _by_name(layers: list[Keys]) -> Measured:
    """Layers of one rule walk together: a token costs as much for all of them as for one."""
    rows: dict[int, list[float]] = {}
    for kind in {(one.rule, one.log_gamma is None) for one in layers}:
        # One stacked walk a rule: the walk's cost is the number of its operations.
        alike = [i for i, one in enumerate(layers) if (one.rule, one.log_gamma is None) == kind]
        rows.update(zip(alike, walk([layers[i] for i in alike]).tolist()))
    names = ("dot", "beta_dot", "clipped")
    return {
        name: [rows[i][n] if math.isfinite(rows[i][n]) else None for i in range(len(layers))]
        for n, name in enumerate(names)
    }


@torch.no_grad()
def walk(layers: list[Keys]) -> Tensor:
    """[dot, beta_dot, clipped] of layers with one rule and the same sequences, [layers, 3]."""
    rule, sequences = layers[0].rule, set(layers[0].sequences)
    # [T, layers, H, K] and [T, layers, H]
    k, beta = (torch.stack([getattr(one, name) for one in layers], 1) for name in ("k", "beta"))
    log_gamma = None
    if layers[0].log_gamma is not None:
        log_gamma = torch.stack([one.log_gamma for one in layers], 1)  # type: ignore[misc]
    start = d = torch.stack([one.start for one in layers])  # [layers, H, K]
    dot, clipped = torch.empty_like(beta), torch.zeros_like(start)
    for t in range(len(k)):
        if t in sequences:
            d = start
        torch.sum(d * k[t].square(), -1, out=dot[t])  # ⟨d_t, s_t⟩, [layers, H]
        if rule.precond_min is not None and rule.precond_max is not None:
            clipped += (d <= rule.precond_min) | (d >= rule.precond_max)  # [layers, H, K]
        d = adapt(d, k[t], beta[t], None if log_gamma is None else log_gamma[t], rule)
    # Over tokens and heads; the last one over features too.
    means = dot.mean((0, 2)), (beta * dot).mean((0, 2)), clipped.mean((1, 2)) / len(k)
    return torch.stack(means, 1)
