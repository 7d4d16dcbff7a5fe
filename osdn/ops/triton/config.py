"""Warps and pipeline stages of each kernel, and the blocks of those that split a dimension.

Fixed rather than autotuned, so that a first call compiles each kernel once and results do not
depend on timings; chosen by benchmarks/op_gpu.py on an H100 at K = V = 128
(docs/explanation/kernels.md).
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from osdn.ops.triton.chunks import tile

CONFIG: dict[str, dict[str, Any]] = {
    "inverse": {"num_warps": 1, "BK": 16},
    "scan": {"num_warps": 4, "STAGES": 4},
    "transfer": {"num_warps": 4, "num_stages": 1, "BV": 64},
    "token_scan": {"num_warps": 1},
    "token_scan_reverse": {"num_warps": 1},
    "clipped_keys": {"num_warps": 1},
    "clipped_gradients": {"num_warps": 1, "SUB": 8},
    "write_keys": {"num_warps": 1, "BK": 32},
    "memory": {"num_warps": 8, "num_stages": 2, "BV": 128},
    "memory_reverse": {"num_warps": 8, "num_stages": 2, "BV": 128},
    "gradients": {"num_warps": 4, "num_stages": 1, "BK": 64, "BV": 128},
    "couple": {"num_warps": 4, "BK": 128},
    "scan_reverse": {"num_warps": 4, "STAGES": 4},
    "precond_gradients": {"num_warps": 4, "BK": 32, "maxnreg": 128},
    "step": {"num_warps": 4, "BV": 128},
}
# Where tiles are larger, they must still fit registers and shared memory.
WIDE: dict[str, dict[str, Any]] = {  # K or V > 128
    "scan": {"num_warps": 8, "STAGES": 2},
    "transfer": {"num_warps": 8, "num_stages": 1, "BV": 64},
    "memory": {"num_warps": 8, "num_stages": 1, "BV": 64},
    "memory_reverse": {"num_warps": 8, "num_stages": 1, "BV": 64},
    "gradients": {"num_warps": 8, "num_stages": 1, "BK": 64, "BV": 64},
    "token_scan_reverse": {"num_warps": 2},
    "clipped_gradients": {"num_warps": 2, "SUB": 8},
    "scan_reverse": {"num_warps": 8, "STAGES": 2},
    "step": {"num_warps": 4, "BV": 64},
}
FLOAT32: dict[str, dict[str, Any]] = {
    "scan": {"num_warps": 8, "STAGES": 2},
    "transfer": {"num_warps": 8, "num_stages": 1, "BV": 64},
    "write_keys": {"num_warps": 4, "BK": 16},
    "memory": {"num_warps": 8, "num_stages": 1, "BV": 32},
    "memory_reverse": {"num_warps": 8, "num_stages": 1, "BV": 32},
    "gradients": {"num_warps": 8, "num_stages": 1, "BK": 32, "BV": 64},
    "couple": {"num_warps": 8, "BK": 32},
    "scan_reverse": {"num_warps": 8, "STAGES": 2},
    "precond_gradients": {"num_warps": 8, "BK": 32},
}
WIDE_FLOAT32: dict[str, dict[str, Any]] = {  # both
    "token_scan_reverse": {"num_warps": 2},
    "clipped_gradients": {"num_warps": 2, "SUB": 8},
    "gradients": {"num_warps": 8, "num_stages": 1, "BK": 16, "BV": 64},
}
# Shared memory a block, in bytes. `memory_reverse` takes 224 KiB with two stages, as an H100 has,
# and 112 KiB with one: with less than the first no loads are pipelined, with less than the second
# its blocks of V are halved.
PIPELINE_BYTES, WHOLE_BYTES = 227 * 1024, 120 * 1024


def launch(name: str, x: Tensor, K: int, V: int = 1) -> dict[str, Any]:
    """The keyword arguments of one kernel's launch for head sizes K and V and data like x."""
    wide = max(K, V) > 128
    special = FLOAT32 if x.dtype == torch.float32 else WIDE if wide else {}
    if special is FLOAT32 and wide:
        special = FLOAT32 | WIDE_FLOAT32
    config = dict(special.get(name, CONFIG[name]))
    for block, size in (("BK", K), ("BV", V)):
        if block in config:
            config[block] = min(config[block], tile(size))
    shared = _shared_bytes(x.device.index) if x.is_cuda else PIPELINE_BYTES
    if shared < PIPELINE_BYTES:
        config |= {stages: 1 for stages in ("num_stages", "STAGES") if stages in config}
    if shared < WHOLE_BYTES and "BV" in config:
        config["BV"] = min(config["BV"], 64)
    return config


@cache
def _shared_bytes(device: int) -> int:
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


def precision(x: Tensor) -> str:
    """input_precision of a dot with a float32 operand: one tf32 product beside 16-bit data."""
    return "tf32x3" if x.dtype == torch.float32 else "tf32"
