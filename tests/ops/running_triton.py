"""What the tests of the Triton kernels share: the device, memory full of NaN, the comparison."""

import pytest
import torch

from tests.numerics import assert_close, relative_error
from tests.ops.running import everything

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What the kernels round besides the plain backend: their dots' operands are in the inputs' dtype.
FLOOR = {torch.float32: 5e-6, torch.float16: 1.5e-3}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN; at work in each module that imports this."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def on_device(inputs: dict) -> dict:
    """Leaves on DEVICE."""
    return {
        n: None if x is None else x.detach().to(DEVICE).requires_grad_() for n, x in inputs.items()
    }


def check(inputs: dict, **options) -> None:
    """Results and all gradients: at most twice the plain backend's error plus the floor."""
    dtype = inputs["q"].dtype
    inputs = on_device(inputs)
    exact = {
        n: None if x is None else x.detach().double().requires_grad_() for n, x in inputs.items()
    }
    expected = everything(exact, "reference", **options)
    plain, actual = (everything(inputs, name, **options) for name in ("chunkwise", "triton"))
    for name, x in expected.items():
        assert_close(actual[name], x, 2 * relative_error(plain[name], x) + FLOOR[dtype], name)
