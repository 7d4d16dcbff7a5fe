"""The first part of `osdn demo`: what one write leaves of a token's error, while d is learned.

No training. A sequence is read whose tokens are of four kinds. A kind has four key features of its
own and its own write strength β. The error that a token's own write leaves is the factor
1 − β⟨d, k ⊙ k⟩, so with DeltaNet's d = 1 a kind with β = 0.25 keeps 75% of its error each time.
OSDN (beta_aware) learns d ≈ 1/β in the features of each kind, which no single number can be.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from osdn.ops import online_scaled_delta_step

STRENGTHS = (0.25, 0.5, 0.75, 1.0)  # β of each kind
FEATURES = 4  # of each kind
TOKENS = 400
SEQUENCES = 20


class Adaptation(NamedTuple):
    """What was measured on sequences of their own, side by side.

    kind: [N, T], which kind each token is.
    precond: [T, N, K], OSDN's d that each token was written with.
    left: by model, [T, N]: ‖v_t − S_tᵀk_t‖ / ‖v_t − S_{t−1}ᵀk_t‖, read out of the memory.
    """

    kind: Tensor
    precond: Tensor
    left: dict[str, Tensor]


def read_sequences(seed: int = 0) -> Adaptation:
    """Read SEQUENCES random sequences of TOKENS tokens with both rules, in float64."""
    g = torch.Generator().manual_seed(seed)
    N, T, K = SEQUENCES, TOKENS, FEATURES * len(STRENGTHS)
    kind = torch.randint(len(STRENGTHS), (N, T), generator=g)
    own = torch.arange(K) // FEATURES == kind[..., None]  # [N, T, K]
    k = torch.randn(N, T, K, generator=g, dtype=torch.float64)
    k = normalize(k.where(own, torch.zeros(())), dim=-1)
    v = torch.randn(N, T, K, generator=g, dtype=torch.float64)  # every token brings a new value
    beta = torch.tensor(STRENGTHS, dtype=torch.float64)[kind]
    left, path = {}, torch.empty(T, N, K, dtype=torch.float64)
    for name, eta in (("DeltaNet", 0.0), ("OSDN", 1.0)):
        S = torch.zeros(N, 1, K, K, dtype=torch.float64)
        d = torch.ones(N, 1, K, dtype=torch.float64)
        shares = []
        for t in range(T):
            path[t] = d[:, 0]
            key, value = k[:, t, None], v[:, t, None]
            before = value - torch.einsum("nhkv,nhk->nhv", S, key)
            # Asked for its own key right after its write, the memory answers S_tᵀ k_t.
            answer, S, d = online_scaled_delta_step(
                key, key, value, beta[:, t, None], state=S, precond=d, eta=eta, beta_aware=True,
                scale=1.0, backend="reference",
            )  # fmt: skip
            shares.append(((value - answer).norm(dim=-1) / before.norm(dim=-1))[:, 0])
        left[name] = torch.stack(shares)
    return Adaptation(kind, path, left)
