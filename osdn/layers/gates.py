"""The gates of the OSDN layer: their parameters, initial values and names in checkpoints."""

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

Forgetting = Literal["none", "data"]
StateDecay = Literal["none", "data"]

# d then forgets over about 1 / (1 − γ) = 1,000 tokens.
APF_BIAS = 6.9  # γ = sigmoid(6.9) ≈ 0.999 at the start
LEAST_A, MOST_A = 1e-4, 16.0  # A is uniform up to 16, as in Mamba 2; 0 has no logarithm
LEAST_DT, MOST_DT = 1e-3, 0.1  # Δ is log-uniform, as in Mamba 2
FORMER_GATE, GATE = "a_proj", "gamma_proj"  # of APF: in early checkpoints, and now


class ForgettingGate(nn.Linear):
    """W_γ x + b_γ [B, T, H], in float32 or wider; log γ is its logsigmoid. γ starts near 0.999."""

    def reset_special_parameters(self) -> None:
        """Fixed initial values: weight 0, bias 6.9 (γ ≈ 0.999)."""
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, APF_BIAS)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.biased(F.linear(x, self.weight.to(x.dtype)))

    def biased(self, product: Tensor) -> Tensor:
        """W_γ x + b_γ from W_γ x; widened first, so that 6.9 + x keeps the digits of x."""
        return widened(product) + self.bias.to(torch.promote_types(product.dtype, torch.float32))


def start_decay(A_log: Tensor, dt_bias: Tensor) -> None:
    """Draw the decay's initial values, each [H], in place: Mamba 2's A and Δ.

    log α = −A softplus(W_a x + dt_bias), which is −A Δ at W_a x = 0.
    """
    # transformers' copy_ leaves a parameter that was loaded as it is.
    A = torch.empty_like(A_log).uniform_(0, MOST_A).clamp(min=LEAST_A)
    initialization.copy_(A_log, A.log())
    low, high = math.log(LEAST_DT), math.log(MOST_DT)
    dt = torch.empty_like(dt_bias).uniform_(low, high).exp()
    initialization.copy_(dt_bias, dt + (-torch.expm1(-dt)).log())  # softplus⁻¹(Δ)


def widened(x: Tensor) -> Tensor:
    """x in float32, or in float64 where it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def former_names(names: Iterable[str]) -> dict[str, str]:
    """Name in a checkpoint -> name now, of the parameters whose names have changed.

    APF's gate was called a_proj, which is the name of Gated DeltaNet's projection. Only the former
    has a bias.
    """
    found = {}
    for bias in names:
        if f".{bias}".endswith(f".{FORMER_GATE}.bias"):
            place = bias.removesuffix(f"{FORMER_GATE}.bias")
            for last in ("weight", "bias"):
                found[f"{place}{FORMER_GATE}.{last}"] = f"{place}{GATE}.{last}"
    return found


def rename_former(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give what load_state_dict was handed its names of now."""
    own = [name for name in state_dict if name.startswith(prefix)]
    for former, name in former_names(own).items():
        state_dict[name] = state_dict.pop(former)
