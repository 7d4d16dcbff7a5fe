"""What a command says once about this machine, on the standard error."""

import sys
from importlib.util import find_spec

import torch

from osdn.train.distributed.parallel import environment_rank


def advise_numba() -> None:
    """Say that the CPU kernels are not installed, where they would be used."""
    if not torch.cuda.is_available() and find_spec("numba") is None and environment_rank() == 0:
        print(
            "note: without numba the operator is about three times slower on a CPU; "
            "pip install 'osdn[cpu]'",
            file=sys.stderr,
        )
