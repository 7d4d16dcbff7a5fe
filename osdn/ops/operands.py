"""The numbers that fix one online scaled delta rule, as the front door hands them on."""

from typing import NamedTuple


class Rule(NamedTuple):
    """Constants of the recurrence; already validated by osdn.ops.interface.

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
        return self.eta == 0 and not has_gamma and self.precond_min is None
