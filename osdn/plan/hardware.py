"""The constants of `osdn plan`: GPUs by their vendors' figures, what was measured, what is assumed.

Corrected in one place: a new measurement changes a `Figure` and its source, and nothing else.
"""

from typing import NamedTuple

import torch

from osdn.errors import UserError
from osdn.model.flops import peak_flops


class Figure(NamedTuple):
    """A number, its unit, and where it comes from."""

    value: float
    unit: str
    source: str


class Gpu(NamedTuple):
    """A GPU: memory in bytes; memory, link (NVLink, one way) and network bandwidth in bytes/s.

    network: of one GPU's share of the machine's adapters.  machine: GPUs in one machine.
    """

    name: str
    memory: float
    bandwidth: float
    link: float
    network: float
    machine: int

    def peak(self, precision: str = "bfloat16") -> float:
        """FLOP/s by the vendor in bfloat16, or in float32."""
        found = peak_flops(self.name, torch.float32 if precision == "float32" else torch.bfloat16)
        assert found is not None
        return found


GIB = 2**30
GPUS = {
    gpu.name: gpu
    for gpu in (
        # name, memory, bandwidth, link, network, GPUs in a machine
        Gpu("A100", 80e9, 2.04e12, 300e9, 25e9, 8),
        Gpu("H100", 80e9, 3.35e12, 450e9, 50e9, 8),
        Gpu("H100 PCIe", 80e9, 2.04e12, 64e9, 25e9, 8),
        Gpu("H200", 141e9, 4.8e12, 450e9, 50e9, 8),
        Gpu("B200", 180e9, 7.7e12, 900e9, 50e9, 8),
        Gpu("L40S", 48e9, 0.864e12, 32e9, 12.5e9, 8),
        Gpu("RTX 4090", 24e9, 1.008e12, 32e9, 12.5e9, 8),
        Gpu("MI300X", 192e9, 5.3e12, 448e9, 50e9, 8),
    )
}
H100 = GPUS["H100"]

BENCH = "docs/reference/speed.md, osdn bench, H100 80GB HBM3, torch 2.11, Triton 3.6"
MATMUL = Figure(807e12, "FLOP/s", f"bfloat16, 8192³; {BENCH}")
COPY = Figure(3.00e12, "B/s", BENCH)
# Milliseconds of (forward, forward and backward) at B16 T4096 H16, K = V = 128, bfloat16.
OPERATOR_MS = {
    "osdn": (2.021, 5.897),
    "osdn_forgetting": (2.131, 6.348),
    "osdn_box": (2.208, 6.042),
    "delta_net": (1.247, 4.633),
}
OPERATOR_TOKEN_HEADS = 16 * 4096 * 16
OPERATOR_SOURCE = f"B16 T4096 H16 K=V=128, else in proportion to K+V; {BENCH}"

NOT_MEASURED = "assumed, until such a model's step has been measured"
GEMM_SHARE = Figure(
    0.80, "of the 8192³ rate, for a model's matrices", "assumed; with the share below"
)
ATTENTION_SHARE = Figure(0.45, "of the 8192³ rate, attention", NOT_MEASURED)
TRAFFIC_SHARE = Figure(
    0.62,
    "of the copy rate, between the products",
    "fitted to the 340M and the 1.3B recipe on an H100: 142,969 and 48,872 tokens/s, 1.01 and "
    "1.05 of what it gives, docs/reference/speed.md",
)
EAGER = Figure(3.0, "times the compiled traffic where train.compile is false", NOT_MEASURED)
LAUNCH = Figure(6e-6, "s to start a kernel", "assumed")
KERNELS = Figure(60, "kernels a block and pass, compiled; 3 times as many in eager", "assumed")
LINK_SHARE = Figure(0.80, "of the vendor's link and network bandwidth", "assumed, as NCCL reaches")
HOP = Figure(5e-6, "s for each machine that a collective passes", "assumed")
OVERLAP = Figure(0.80, "of the backward hides communication", "assumed")
RESERVE = Figure(2.0 * GIB, "B for the CUDA context, NCCL and libraries", "assumed")
FRAGMENTS = Figure(1.05, "times the tensors, for the allocator's gaps", "assumed")


def find_gpu(name: str) -> Gpu:
    """The GPU of that name, whatever the case of its letters."""
    for known, gpu in GPUS.items():  # "h100pcie" as well as "H100 PCIe"
        if known.lower().replace(" ", "") == name.lower().replace(" ", ""):
            return gpu
    raise UserError(f"--gpu: expected one of {', '.join(GPUS)}, got {name!r}")


def assumptions() -> list[str]:
    """Every constant with its source, one a line."""
    lines = [f"matrix products {MATMUL.value / 1e12:.0f} TFLOP/s ({MATMUL.source})"]
    lines.append(f"memory traffic {COPY.value / 1e12:.2f} TB/s ({COPY.source})")
    times = ", ".join(f"{name} {both:g}" for name, (_, both) in OPERATOR_MS.items())
    lines.append(f"operator, forward and backward, ms: {times} ({OPERATOR_SOURCE})")
    for figure in (GEMM_SHARE, ATTENTION_SHARE, TRAFFIC_SHARE, EAGER, KERNELS, LINK_SHARE, OVERLAP):
        lines.append(f"{figure.value:g} {figure.unit} ({figure.source})")
    lines.append(f"{LAUNCH.value * 1e6:g} µs to start a kernel ({LAUNCH.source})")
    lines.append(f"{HOP.value * 1e6:g} µs for each machine that a collective passes ({HOP.source})")
    lines.append(
        f"{RESERVE.value / GIB:g} GiB for the CUDA context, NCCL and libraries, and "
        f"{FRAGMENTS.value:g} {FRAGMENTS.unit} (assumed)"
    )
    lines.append("other GPUs than the H100 by their vendors' peak and bandwidth")
    return lines
