"""Estimate what a loop of a walk takes from its machine code, where there is no GPU.

    python -m benchmarks.loop_cycles token_scan

For a kernel that runs as one warp: instructions are issued in order, each after the stall that the
compiler wrote into the one before and after the scoreboards that it waits for. Printed are the
cycles of one turn of each loop, in the steady state, for four latencies of a load. An estimate: the
latencies below are assumed, and caches of instructions and conflicts of pipes are left out.
"""

import re
import sys
from typing import NamedTuple

import torch

from benchmarks.compile_kernels import compile_all, disassemble

LATENCIES = {"SHFL": 23, "MUFU": 20, "S2R": 30, "R2UR": 12, "LDS": 30, "LDC": 40}
OTHER, READ = 15, 12  # another instruction that sets a scoreboard; until one has read its operands
LOADS = (400, 600, 800, 1000)
TURNS = 40


class Instruction(NamedTuple):
    """One instruction and its control bits (105 to 121 of 128, as on Volta and later)."""

    address: int
    text: str
    stall: int
    write: int  # the scoreboard that its result, or that the reading of its operands, clears
    read: int
    wait: int  # a bit for each scoreboard


def decode(cubin: bytes) -> list[Instruction]:
    """The instructions of a kernel."""
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(.*?);\s+/\* 0x[0-9a-f]{16} \*/\s+/\* 0x([0-9a-f]{16}) \*/"
    found = []
    for address, text, high in re.findall(pattern, disassemble(cubin, "-sass")):
        bits = int(high, 16) >> 41
        fields = bits & 15, bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63
        found.append(Instruction(int(address, 16), text, *fields))
    return found


def loops(instructions: list[Instruction]) -> list[list[Instruction]]:
    """The instructions from each backward branch's target to it."""
    found = []
    for last in instructions:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", last.text)
        if target and int(target[1], 16) < last.address:
            first = int(target[1], 16)
            found.append([x for x in instructions if first <= x.address <= last.address])
    return found


def cycles(loop: list[Instruction], load: int) -> float:
    """The cycles of one turn, by the second half of TURNS."""
    ready = [0] * 8
    time, turns = 0, []
    for _ in range(TURNS):
        turns.append(time)
        for x in loop:
            time = max(time, *(ready[i] for i in range(6) if x.wait >> i & 1), 0)
            name = re.sub(r"^@!?U?P\w+ ", "", x.text).split()[0].split(".")[0]
            latency = load if name == "LDG" else LATENCIES.get(name, OTHER)
            ready[x.write] = max(ready[x.write], time + latency)
            ready[x.read] = max(ready[x.read], time + READ)
            time += max(x.stall, 1)
    half = TURNS // 2
    return (turns[-1] - turns[half]) / (TURNS - 1 - half)


def main(names: list[str]) -> None:
    for _, kernels in compile_all(90, torch.bfloat16, names, ["retention, box"]):
        for kernel in kernels:
            for loop in loops(decode(kernel.cubin)):
                found = ", ".join(f"{cycles(loop, load):.0f}" for load in LOADS)
                print(f"{kernel.name}: {len(loop)} instructions, {found} cycles at {LOADS} a load")


if __name__ == "__main__":
    main(sys.argv[1:])
