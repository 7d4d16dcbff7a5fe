"""What an OSDN layer fixes for its decoding step; the steps are in numba/ and triton/."""

from typing import NamedTuple


class Constants(NamedTuple):
    """What a layer fixes once: sizes, the rule, and which optional parts it has."""

    heads: int
    key_size: int
    value_size: int
    eta: float
    beta_aware: bool
    precond_min: float | None
    precond_max: float | None
    scale: float
    norm_eps: float
    allow_neg_eigval: bool
    output_gate: bool
