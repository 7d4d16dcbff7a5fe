"""How well the device is used, and how full it gets."""

import resource
import sys

import torch

from osdn.flops import peak_flops


def utilisation(
    tokens_per_s: float, flops: int, device: torch.device, precision: str, devices: int
) -> float | None:
    """Model FLOPs a second over the devices' peak; None for a device whose peak is not known.

    Args:
        flops: of a token of training.
        device: one of `devices` alike.
        precision: "float32" or "bfloat16".
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    peak = peak_flops(name, getattr(torch, precision))
    return None if peak is None else round(tokens_per_s * flops / (devices * peak), 4)


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on a CUDA device at most, or resident in this process at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
