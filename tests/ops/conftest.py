"""The backends that every test of the operator runs on, in one place."""

from importlib.util import find_spec

import pytest
import torch

NEEDS = {"reference": "osdn.ops.reference", "chunkwise": "osdn.ops.chunkwise", "numba": "numba"}


def _backend(name: str):
    missing = find_spec(NEEDS[name]) is None
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"no {NEEDS[name]} here"))


@pytest.fixture(params=[_backend(name) for name in NEEDS])
def backend(request) -> str:
    """Each backend in turn, the definition included."""
    return request.param


@pytest.fixture(params=[_backend(name) for name in NEEDS if name != "reference"])
def fast_backend(request) -> str:
    """Each backend in turn that is compared with the definition."""
    return request.param


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors here are small: PyTorch's threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
