"""The one comparison of results: for the tests, `osdn selfcheck` and the benchmarks."""

from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; the absolute norm where expected is zero.

    Over the whole tensor: single entries near zero have no digits. NaN where either has one.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}")
    actual, expected = (x.detach().double() for x in (actual, expected))
    norm = expected.norm().item()
    return ((actual.to(expected.device) - expected).norm() / (norm if norm > 0 else 1.0)).item()
