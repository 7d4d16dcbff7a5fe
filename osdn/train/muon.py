"""Muon for the matrices of the blocks and AdamW for the rest, as one optimizer.

Muon (https://kellerjordan.github.io/posts/muon/) replaces the mean gradient M of a matrix by the
nearest orthogonal one, U Vᵀ of M = U Σ Vᵀ, by five Newton-Schulz steps in bfloat16. Here it is
torch.optim.Muon's arithmetic with the scale of arXiv 2502.16982, 0.2 · sqrt(larger dimension), at
which the learning rate and decay of AdamW hold for it too.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim._muon import muon  # torch.optim.Muon's arithmetic; it has no public name

from osdn.model.modeling import OSDNForCausalLM


class Muon(torch.optim.Muon):
    """PyTorch's Muon for matrices that may be sharded; a step with `found_inf` changes nothing.

    The orthogonal matrix needs the whole of M. So a sharded matrix is gathered, updated by every
    process, and each keeps its rows: 12 bytes a number through the network at every step, and the
    products of Newton-Schulz in every process. Nothing waits for the device.
    """

    found_inf: Tensor | None = None  # 1 where the step must be left out, as PyTorch's fused AdamW's

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            options = {name: value for name, value in group.items() if name != "params"}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                buffer = self.state[parameter]["momentum_buffer"]
                new, new_buffer = _whole(parameter).clone(), _whole(buffer).clone()
                muon([new], [_whole(parameter.grad)], [new_buffer], has_complex=False, **options)
                _replace(parameter, new, self.found_inf)
                _replace(buffer, new_buffer, self.found_inf)


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _replace(old: Tensor, whole: Tensor, found_inf: Tensor | None) -> None:
    """Put this process's share of `whole` in the place of `old`, unless found_inf is 1."""
    mine = whole
    if isinstance(old, DTensor):
        everywhere = [Replicate()] * old.device_mesh.ndim
        shared = DTensor.from_local(whole, old.device_mesh, everywhere, run_check=False)
        mine = shared.redistribute(placements=old.placements).to_local()
        old = old.to_local()
    old.copy_(mine if found_inf is None else torch.where(found_inf != 0, old, mine))


class MuonWithAdamW:
    """What the trainer asks of an optimizer, of both together."""

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW) -> None:
        self.parts: tuple[Muon, torch.optim.AdamW] = (muon, adamw)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def found_inf(self) -> Tensor | None:
        return self.parts[0].found_inf

    @found_inf.setter
    def found_inf(self, value: Tensor) -> None:
        for part in self.parts:
            part.found_inf = value  # type: ignore[union-attr]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)


def block_matrices(model: nn.Module) -> set[nn.Parameter]:
    """The weights of the blocks' linear layers, but for the gates', which have one row a head."""
    if not isinstance(model, OSDNForCausalLM):
        raise TypeError(f"model: expected an OSDNForCausalLM for Muon, got {type(model).__name__}")
    heads = model.config.num_heads
    layers = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    found = [layer.weight for layer in layers if layer.out_features > heads]
    return {weight for weight in found if isinstance(weight, nn.Parameter)}
