"""Running the operator with all that comes out of it, and the delta rule it generalises."""

import torch
from torch import Tensor

from osdn.ops import online_scaled_delta_rule
from tests.numerics import assert_close

OUTPUTS = ("o", "final_state", "final_precond")
BOX = {"precond_min": 0.7, "precond_max": 0.8}  # both bounds are hit often: see test_gradients


def outputs(inputs: dict, backend: str, **options) -> dict[str, Tensor]:
    """The three results by name."""
    results = online_scaled_delta_rule(
        **inputs, output_final_state=True, backend=backend, **options
    )
    return dict(zip(OUTPUTS, results))


def gradients(inputs: dict, results: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of one random linear function of all results, by input."""
    g = torch.Generator().manual_seed(99)
    loss = sum(
        (x.double() * torch.randn(x.shape, generator=g, dtype=torch.float64)).sum()
        for x in results.values()
    )
    wanted = {name: x for name, x in inputs.items() if x is not None and x.requires_grad}
    return {
        f"d{name}": x for name, x in zip(wanted, torch.autograd.grad(loss, list(wanted.values())))
    }


def everything(inputs: dict, backend: str, **options) -> dict[str, Tensor]:
    """The three results and the gradients."""
    results = outputs(inputs, backend, **options)
    return {name: x.detach() for name, x in results.items()} | gradients(inputs, results)


def assert_all_close(actual: dict, expected: dict, tolerance: float) -> None:
    """Every entry of expected is in actual, within tolerance."""
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert_close(actual[name], x, tolerance, name)


def detached(inputs: dict) -> dict:
    """The inputs at their values, without gradients."""
    return {name: x if x is None else x.detach() for name, x in inputs.items()}


def delta_rule(q, k, write_key, v, beta, S, scale) -> tuple[Tensor, Tensor]:
    """(o, S): the delta rule written for one token and head at a time, by outer products.

    Source: arXiv 2406.06484, equation 2 with the write key apart from the read key.
    """
    B, T, H, K = q.shape
    o, S = torch.zeros_like(v), S.clone()
    for b in range(B):
        for h in range(H):
            for t in range(T):
                erase = torch.eye(K, dtype=q.dtype)
                erase -= beta[b, t, h] * torch.outer(write_key[b, t, h], k[b, t, h])
                write = beta[b, t, h] * torch.outer(write_key[b, t, h], v[b, t, h])
                S[b, h] = erase @ S[b, h] + write
                o[b, t, h] = scale * q[b, t, h] @ S[b, h]
    return o, S
