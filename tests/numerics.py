"""Where test inputs are made, and results compared by the library's own relative error."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from osdn.ops.numerics import relative_error


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "result") -> None:
    """Fail, with the figure, where the relative error is above tolerance or not finite."""
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{name}: relative error {error:.3e} > {tolerance:.1e}"


def make_inputs(
    B: int,
    T: int,
    H: int,
    K: int,
    V: int,
    *,
    sequences: int | None = None,
    gamma: bool = True,
    alpha: bool = False,
    unit_keys: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Random tensor arguments of online_scaled_delta_rule, by name, with every gradient asked for.

    γ is near 0.98, α (with alpha) near 0.88, d_1 near 1, β in (0, 1); states and gates are float32
    unless dtype is float64.
    """
    g = torch.Generator().manual_seed(seed)
    N = B if sequences is None else sequences
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    k = normal(B, T, H, K)
    q, v = normalize(normal(B, T, H, K), dim=-1), normal(B, T, H, V)
    beta = normal(B, T, H).sigmoid()
    inputs = {
        "q": q.to(dtype),
        "k": (normalize(k, dim=-1) if unit_keys else 0.5 * k * K**-0.5).to(dtype),
        "v": v.to(dtype),
        "beta": beta.to(accumulate),
        "log_gamma": logsigmoid(normal(B, T, H) + 4).to(accumulate) if gamma else None,
        "initial_state": (0.3 * normal(N, H, K, V)).to(accumulate),
        "initial_precond": (1 + 0.3 * normal(N, H, K)).to(accumulate),
    }
    if alpha:  # after the rest, whose values then do not depend on it
        inputs["log_alpha"] = logsigmoid(normal(B, T, H) + 2).to(accumulate)
    return {name: x if x is None else x.requires_grad_() for name, x in inputs.items()}
