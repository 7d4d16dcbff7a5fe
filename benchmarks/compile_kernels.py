"""Compile every kernel for a GPU that is not here: does it compile, and what does it take?

    python benchmarks/compile_kernels.py [--capability 90]

Needs Triton and no GPU: a stand-in for Triton's driver names the target, each launch compiles and
stops there, and the registers and spills are read off the machine code. The interpreter, which runs
the kernels on a CPU, checks no types; this does, and runs nothing. K = V = 128, bfloat16, with and
without retention and a box, and one step. Compare two commits before a change goes to a GPU.
"""

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from osdn.ops import triton as kernels
from osdn.ops.operands import Operands, Options, Token

BOX = {"beta_aware": True, "precond_min": 0.0, "precond_max": 2.0}
Row = tuple[str, str, str]


class Absent:
    """What Triton asks a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def resources(cubin: bytes) -> tuple[str, str]:
    """(registers a thread, bytes of stack a thread, which is what was spilt) as cuobjdump says."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        words = [cuobjdump, "--dump-resource-usage", file.name]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    registers, stack = (re.search(rf"{word}:(\d+)", said) for word in ("REG", "STACK"))
    return registers[1] if registers else "?", stack[1] if stack else "?"


def compile_all(capability: int) -> Iterator[tuple[str, list[Row]]]:
    """(case, [(kernel, registers, bytes of stack)]) of every kind of call."""
    rows: list[Row] = []
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
        kernel = original(self, *args, grid=grid, warmup=True, **options)
        rows.append((self.fn.__name__, *resources(kernel.asm["cubin"]), str(kernel.metadata.shared)))
        return kernel

    JITFunction.run = run
    driver.set_active(Absent(capability))
    kernels.on_device = lambda x: nullcontext()  # type: ignore[assignment]
    B, T, H, K = 1, 200, 2, 128
    q, k, v = (torch.randn(B, T, H, K, dtype=torch.bfloat16) for _ in range(3))
    beta, S, d = torch.rand(B, T, H), torch.zeros(B, H, K, K), torch.ones(B, H, K)
    for gamma in (None, -torch.rand(B, T, H)):
        for box in ({"beta_aware": False, "precond_min": None, "precond_max": None}, BOX):
            options = Options(eta=1.0, scale=0.1, **box)
            given = Operands(q, k, v, beta, gamma, None, S, d, None)
            o, _, _, saved = kernels.forward(given, options, True)
            kernels.backward(torch.ones_like(o), S, d, given, saved, options)
            one = [None if x is None else x[:, 0].contiguous() for x in given[:6]]
            kernels.step(Token(*one, S, d, None, None), options)
            names = ("no retention" if gamma is None else "retention", "box" if box is BOX else "")
            yield ", ".join(filter(None, names)), list(dict.fromkeys(rows))
            rows.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--capability", type=int, default=90, help="80, 89, 90, 100 (default 90)")
    args = parser.parse_args()
    print(f"Triton {triton.__version__}, sm_{args.capability}")
    for case, rows in compile_all(args.capability):
        print(case)
        for name, registers, spills in rows:
            print(f"  {name:28s} {registers:>4s} registers {spills:>5s} bytes of stack")


if __name__ == "__main__":
    main()
