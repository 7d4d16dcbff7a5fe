"""Warps and pipeline stages of each kernel, and the blocks of those that split a dimension.

Fixed rather than autotuned, so that a first call compiles each kernel once and results do not
depend on timings; chosen by benchmarks/op_gpu.py on an H100 at K = V = 128 (docs/kernels.md).
"""

from typing import Any

import torch
from torch import Tensor

CONFIG: dict[str, dict[str, Any]] = {
    "inverse": {"num_warps": 4},
    "scan": {"num_warps": 4},
    "token_scan": {"num_warps": 1},
    "write_keys": {"num_warps": 4},
    "memory": {"num_warps": 4, "num_stages": 2, "BV": 64},
    "states": {"num_warps": 4, "num_stages": 3, "BK": 64, "BV": 64},
    "memory_reverse": {"num_warps": 4, "num_stages": 2, "BV": 64},
    "gradients": {"num_warps": 4, "num_stages": 2, "BK": 64, "BV": 64},
    "couple": {"num_warps": 4, "BK": 64},
    "scan_reverse": {"num_warps": 4},
    "precond_gradients": {"num_warps": 4, "BK": 64},
    "step": {"num_warps": 8, "BV": 128},
}


def precision(x: Tensor) -> str:
    """input_precision of a dot with a float32 operand: one tf32 product beside 16-bit data."""
    return "tf32x3" if x.dtype == torch.float32 else "tf32"
