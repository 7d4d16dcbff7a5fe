"""How well the device is used, and how full it gets."""

import sys
import time

import torch

from osdn.model.flops import peak_flops


def utilisation(
    tokens_per_s: float, flops: int, device: torch.device, precision: str, devices: int
) -> float | None:
    """Model FLOPs a second over the devices' peak; None for a device whose peak is not known.

    Args:
        flops: of a token of training.
        device: one of `devices` alike.
        precision: "float32" or "bfloat16".
    """
    # No peak is known for a CPU, whose name is then "cpu".
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    peak = peak_flops(name, getattr(torch, precision))
    return None if peak is None else round(tokens_per_s * flops / (devices * peak), 4)


def peak_memory(device: torch.device) -> int | None:
    """Bytes: allocated on a CUDA device at most, or resident in this process at most.

    None on Windows, whose Python has no `resource`.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Moment:
    """A point in the work of a CUDA device, or of time on a CPU; marking it waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self.time = time.perf_counter()
        self.event: torch.cuda.Event | None = None
        if device.type == "cuda":
            # On the stream that computes, so that it is reached when the work before it is done.
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Until the device has come to it."""
        if self.event is not None:
            self.event.synchronize()

    def after(self, earlier: "Moment") -> float:
        """Seconds between the two, both of one device and waited for."""
        if self.event is None or earlier.event is None:
            return self.time - earlier.time
        return earlier.event.elapsed_time(self.event) / 1000
