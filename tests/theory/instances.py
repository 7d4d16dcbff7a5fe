"""Adversarial instances for the bounds: batches of keys, gates and comparators, float64."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

BATCH = 24
FAMILIES = ("dense", "one-hot", "near-duplicate", "ill-conditioned", "sparse")
PROPERTY = settings(max_examples=120, deadline=None, derandomize=True)

shapes = st.tuples(st.integers(1, 40), st.sampled_from((1, 2, 3, 8)))
seeds = st.integers(0, 2**31 - 1)
families = st.sampled_from(FAMILIES)
# η at its limits: almost 0, the default, and almost 2.
etas = st.one_of(st.sampled_from((1e-6, 1.0, 1.5, 2 - 1e-6)), st.floats(0.01, 1.99))
boxes = st.sampled_from((None, (0.0, 2.0), (2 / 3, 1.5), (1.0, 1.0), (0.99, 3.0)))


class Draw:
    """A seeded source of the tensors below; every batch has BATCH instances."""

    def __init__(self, seed: int, T: int, K: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.T, self.K = T, K

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def keys(self, family: str) -> Tensor:
        """Unit keys [BATCH, T, K] of one family; ill-conditioned: covariance up to 1e8."""
        k = self.normal(BATCH, self.T, self.K)
        if family == "one-hot":
            k = torch.nn.functional.one_hot(k.argmax(-1), self.K).double()
        elif family == "near-duplicate":
            k = self.normal(BATCH, 1, self.K) + 1e-4 * k
        elif family == "ill-conditioned":
            k = k * torch.logspace(0, -4, self.K, dtype=torch.float64)
            rotation = torch.linalg.qr(self.normal(self.K, self.K)).Q
            k[BATCH // 2 :] = k[BATCH // 2 :] @ rotation
        elif family == "sparse":
            k = k * (self.uniform(*k.shape) < 0.3) + 1e-3 * k
        return normalize(k, dim=-1)

    def inside(self, box: tuple[float, float] | None, *shape: int) -> Tensor:
        """A point of the box (of [−1, 3] without one), often on its faces."""
        low, high = (-1.0, 3.0) if box is None else box
        return (low + (high - low) * (1.6 * self.uniform(*shape) - 0.3)).clamp(low, high)


def holds(left: Tensor, right: Tensor, rounding: float = 1e-12) -> None:
    """left ≤ right up to rounding: 1e-9 of right, and `rounding` for a right side near 0.

    x_t is computed with an error of about 1e-15 times |d|, so Σ x_t² carries some 1e-28; sums of
    logarithms carry 1e-13.
    """
    excess = (left - right - 1e-9 * right.abs() - rounding).max().item()
    assert excess <= 0, f"violated by {excess:.3e}"
