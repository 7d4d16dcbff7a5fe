"""Compile every kernel for a GPU that is not here: does it compile, and what does it take?

    python benchmarks/compile_kernels.py [--capability 90] [--dtype bfloat16] [--only memory scan]

Needs Triton and no GPU: a stand-in for Triton's driver names the target, each launch compiles and
stops there, and registers, spills, shared memory and the instructions of the longest loop are read
off the machine code. The interpreter, which runs the kernels on a CPU, checks no types; this does,
and runs nothing. K = V = 128. Compare two commits before a change goes to a GPU.
"""

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from osdn.ops import triton as kernels
from osdn.ops.layer_step import Constants
from osdn.ops.operands import Operands, Options, Token
from osdn.ops.triton import chunks, convolution, layer_step, products

FREE = Options(1.0, False, None, None, 0.1)
BOX = Options(1.0, True, 0.0, 2.0, 0.1)


class Kernel(NamedTuple):
    """A kernel as compiled, and the bytes of shared memory that it takes."""

    name: str
    cubin: bytes
    shared: int


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


def disassemble(cubin: bytes, option: str) -> str:
    """What cuobjdump says of machine code."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        words = [cuobjdump, option, file.name]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> tuple[str, str]:
    """(registers a thread, bytes of stack a thread, which is what was spilt)."""
    said = disassemble(cubin, "--dump-resource-usage")
    registers, stack = (re.search(rf"{word}:(\d+)", said) for word in ("REG", "STACK"))
    return registers[1] if registers else "?", stack[1] if stack else "?"


def longest_loop(cubin: bytes) -> int:
    """The most instructions from a branch's target to the branch that goes back to it."""
    branch = r"/\*([0-9a-f]{4,})\*/.*\bBRA\b.*?0x([0-9a-f]+)"
    found = re.findall(branch, disassemble(cubin, "-sass"))
    spans = [int(at, 16) - int(target, 16) for at, target in found]
    return max([0, *(x // 16 + 1 for x in spans if x > 0)])


def rule(dtype: torch.dtype, options: Options, T: int = 200, **gates: bool) -> None:
    """Both walks of a call over whole sequences, and one step; gates: log_gamma, log_alpha."""
    B, H, K = 1, 2, 128
    q, k, v = (torch.randn(B, T, H, K, dtype=dtype) for _ in range(3))
    beta, S, d = torch.rand(B, T, H), torch.zeros(B, H, K, K), torch.ones(B, H, K)
    gamma, alpha = (beta if gates.get(name) else None for name in ("log_gamma", "log_alpha"))
    given = Operands(q, k, v, beta, gamma, alpha, S, d, None)
    o, _, _, saved = kernels.forward(given, options, True)
    kernels.backward(torch.ones_like(o), S, d, given, saved, options)
    one = [None if x is None else x[:, 0].contiguous() for x in given[:6]]
    kernels.step(Token(*one, S, d, None, None), options)


def long_rule(dtype: torch.dtype) -> None:
    """The rule over one sequence that is cut into segments, in both phases."""
    before, chunks.LONG = chunks.LONG, 16
    rule(dtype, FREE, T=2048 + 64, log_gamma=True, log_alpha=True)
    chunks.LONG = before


def convolutions(dtype: torch.dtype) -> None:
    """The short convolution of a layer, with and without the norm of each head."""
    x, weight = torch.randn(1, 300, 256, dtype=dtype), torch.randn(256, 4, dtype=dtype)
    for head in (128, None):
        convolution.backward(convolution.forward(x, weight, None, head), x, weight, None, head)


def decoding(dtype: torch.dtype, rows: int) -> None:
    """A layer's step and the products around it."""
    D, H, K = 256, 2, 128
    stream = products.stream_like(torch.randn(rows, D, dtype=dtype))
    gain, weight = torch.ones(D, dtype=dtype), torch.randn(D, D, dtype=dtype)
    out, ids = torch.empty(rows, D, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
    products.embed(ids, weight, gain, stream)
    products.project(stream, gain, [weight], out, 1e-5)
    products.gated_product(stream, gain, weight, weight, out, 1e-5)
    products.add_product(out, weight, gain, stream)
    layer_step.layer_step(
        torch.randn(rows, H * (4 * K + 2), dtype=dtype), torch.ones(rows, dtype=torch.bool),
        (torch.zeros(rows, 2 * H * K, 3, dtype=dtype), torch.zeros(rows, H * K, 3, dtype=dtype)),
        (weight[:, None, :4].contiguous(),) * 3, torch.zeros(H, dtype=dtype), None,
        torch.ones(K, dtype=dtype), torch.zeros(rows, H, K, K), torch.ones(rows, H, K), out,
        Constants(H, K, K, 1.0, True, None, None, 0.1, 1e-5, False, True),
    )  # fmt: skip


CASES: dict[str, Callable[[torch.dtype], None]] = {
    "rule": lambda dtype: rule(dtype, FREE),
    "retention": lambda dtype: rule(dtype, FREE, log_gamma=True),
    "retention, box": lambda dtype: rule(dtype, BOX, log_gamma=True),
    "decay": lambda dtype: rule(dtype, FREE, log_alpha=True),
    "delta rule": lambda dtype: rule(dtype, FREE._replace(eta=0.0)),
    "retention and decay in segments": long_rule,
    "convolution": convolutions,
    "decoding, one row": lambda dtype: decoding(dtype, 1),
    "decoding, 8 rows": lambda dtype: decoding(dtype, 8),
}


def compile_all(
    capability: int, dtype: torch.dtype, only: list[str], cases: Iterable[str] = CASES
) -> Iterator[tuple[str, list[Kernel]]]:
    """(case, its kernels) of every kind of call.

    only: parts of kernels' names; the others are left out.
    """
    found: list[Kernel] = []
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
        if only and not any(name in self.fn.__name__ for name in only):
            return None
        kernel = original(self, *args, grid=grid, warmup=True, **options)
        found.append(Kernel(self.fn.__name__, kernel.asm["cubin"], kernel.metadata.shared))
        return kernel

    JITFunction.run = run
    driver.set_active(Absent(capability))
    for module in (kernels, convolution, layer_step, products):
        module.on_device = lambda x: nullcontext()  # type: ignore[attr-defined]
    for name in cases:
        CASES[name](dtype)
        yield name, list(dict.fromkeys(found))
        found.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--capability", type=int, default=90, help="80, 89, 90, 100 (default 90)")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float16, float32")
    parser.add_argument("--only", nargs="+", default=[], help="parts of kernels' names")
    args = parser.parse_args()
    print(f"Triton {triton.__version__}, sm_{args.capability}")
    for case, found in compile_all(args.capability, getattr(torch, args.dtype), args.only):
        print(case)
        lines = {}  # a dict: in order, and kernels that differ in nothing printed once
        for name, cubin, shared in found:
            registers, stack = resources(cubin)
            line = (
                f"  {name:28s} {registers:>4s} registers {stack:>5s} bytes of stack "
                f"{shared:>7d} shared {longest_loop(cubin):>5d} instructions in a loop"
            )
            lines[line] = None
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
