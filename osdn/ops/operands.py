"""What one call of the operator hands to a backend: its tensors, and its numbers.

Shapes as in osdn.ops.interface. Everything is validated there, once. The gates (beta, log_gamma,
log_alpha) and the states are contiguous and in the accumulation dtype: float32, or float64 for
float64 input.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Operands(NamedTuple):
    """The tensors of one call over whole sequences; an absent one is None.

    q, k: [B, T, H, K].  v: [B, T, H, V].  beta, log_gamma, log_alpha: [B, T, H].
    initial_state: [N, H, K, V].  initial_precond: [N, H, K].  cu_seqlens: [N + 1].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_gamma: Tensor | None
    log_alpha: Tensor | None
    initial_state: Tensor
    initial_precond: Tensor
    cu_seqlens: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """The accumulation dtype."""
        return self.initial_state.dtype

    def differentiable(self) -> list[Tensor]:
        """The operands that are given and have a gradient, in the order of the fields."""
        return [x for x in self[:-1] if x is not None]


class Token(NamedTuple):
    """The tensors of one call over one token; an absent one is None.

    q, k: [B, H, K].  v: [B, H, V].  beta, log_gamma, log_alpha: [B, H].
    state: [P, H, K, V] and precond: [P, H, K], which the backend updates in place; each place is
    contiguous, the places may lie anywhere apart.
    slots, write_slots: [B], the place that each row reads and the one that it writes; write_slots
    None: the same. Without slots P = B and row i is at i.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_gamma: Tensor | None
    log_alpha: Tensor | None
    state: Tensor
    precond: Tensor
    slots: Tensor | None
    write_slots: Tensor | None

    def places(self) -> tuple[Tensor, Tensor]:
        """The place that each row reads and the one it writes, [B] int64; negative: none."""
        if self.slots is None:
            # Without slots, row i in place i, so that callers have one case.
            everywhere = torch.arange(len(self.q), device=self.q.device)
            return everywhere, everywhere
        read = self.slots.long().contiguous()
        return read, read if self.write_slots is None else self.write_slots.long().contiguous()


class Options(NamedTuple):
    """The numbers that fix the recurrence.

    eta: step size η of the hypergradient descent on d.  beta_aware: b_t = β_t instead of 1.
    precond_min, precond_max: the box d is projected onto after each token; both or neither None.
    scale: the factor on every read.
    """

    eta: float
    beta_aware: bool
    precond_min: float | None
    precond_max: float | None
    scale: float

    def constant_precond(self, has_gamma: bool) -> bool:
        """True where d never moves from its start, so that phase 1 need not run at all."""
        # With a box even η = 0 moves d once, if it starts outside.
        return self.eta == 0 and not has_gamma and self.precond_min is None
