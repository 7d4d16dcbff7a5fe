"""The operator on a CPU beside transformers' PyTorch fallback: time, memory and decoding.

    python benchmarks/op_cpu.py --out op_cpu.json

Every round times each case once, in turn; a ratio is taken within a round, and the median over the
rounds is quoted with its quartiles, so that a load that comes and goes hits both sides alike. The
peer is `torch_chunk_gated_delta_rule` with a decay of 0, which is the delta rule: what a model of
transformers runs where FLA is not installed. Times are wall-clock; beside them stands the CPU time
of all threads: with `OMP_NUM_THREADS=1` and `--threads 1` a second witness on a busy machine.

Memory is the peak resident size (VmHWM, Linux) of forward + backward in a process of its own, above
what it held with the inputs and the cotangent made and a short call done: outputs, gradients, what
is saved and working space. It is given over the bytes of q, k, v and o together.
"""

import argparse
import inspect
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from osdn.ops import online_scaled_delta_rule, online_scaled_delta_step

BACKENDS = ("numba", "chunkwise")
OFF = {"eta": 0.0}
ON = {"eta": 1.0}
FULL = {"eta": 1.0, "beta_aware": True, "precond_min": 0.0, "precond_max": 2.0}
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)


def inputs(B: int, T: int, H: int, D: int) -> dict[str, Tensor]:
    """Unit q and k, normal v, β in (0, 1), γ near 0.98; all float32."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, T, H, D) for _ in range(3))
    gates = {"beta": torch.rand(B, T, H), "log_gamma": logsigmoid(torch.randn(B, T, H) + 4)}
    return {"q": normalize(q, dim=-1), "k": normalize(k, dim=-1), "v": v} | gates


def measure(forward: Callable, x: dict[str, Tensor], do: Tensor | None) -> Callable[[], float]:
    """Seconds of one call of o = forward(x): without gradients, or with do handed back."""

    def once() -> float:
        leaves = [y.detach().requires_grad_(do is not None) for y in x.values()]
        named = dict(zip(x, leaves))
        start = time.perf_counter()
        o = forward(named)
        if do is not None:
            torch.autograd.grad(o, leaves, do, allow_unused=True)
        return time.perf_counter() - start

    return once


def osdn(backend: str, rule: dict, gamma: bool = False) -> Callable:
    """The operator as a function of the named inputs."""

    def forward(x: dict[str, Tensor]) -> Tensor:
        log_gamma = x["log_gamma"] if gamma else None
        return online_scaled_delta_rule(
            x["q"], x["k"], x["v"], x["beta"], log_gamma, backend=backend, **rule
        )[0]

    return forward


def transformers_rule(x: dict[str, Tensor]) -> Tensor:
    """The peer, out of its wrapper, which would call FLA's GPU kernels where FLA is installed."""
    from transformers.models.qwen3_next import modeling_qwen3_next

    rule = inspect.unwrap(modeling_qwen3_next.torch_chunk_gated_delta_rule)
    return rule(x["q"], x["k"], x["v"], torch.zeros_like(x["beta"]), x["beta"])[0]


Times = dict[str, dict[str, list[float]]]


def compare(rounds: int, size: tuple[int, int, int, int]) -> tuple[Times, Times]:
    """Seconds by pass and case, a list over the rounds: of the clock, and of the processors."""
    x = inputs(*size)
    cases = {"transformers": transformers_rule}
    for backend in BACKENDS:
        cases[f"{backend} off"] = osdn(backend, OFF)
        cases[f"{backend} OSDN"] = osdn(backend, ON)
        cases[f"{backend} OSDN, APF, box, beta_aware"] = osdn(backend, FULL, gamma=True)
    expected = transformers_rule(x)
    for name, forward in cases.items():
        if name.endswith("off"):
            torch.testing.assert_close(forward(x), expected, rtol=1e-3, atol=1e-4)
    times: Times = {}
    cpu: Times = {}
    for kind, do in (("forward", None), ("forward+backward", torch.randn_like(x["v"]))):
        runs = {name: measure(forward, x, do) for name, forward in cases.items()}
        for run in runs.values():
            run()
        times[kind], cpu[kind] = ({name: [] for name in runs} for _ in range(2))
        for _ in range(rounds):
            for name, run in runs.items():
                start = time.process_time()
                times[kind][name].append(run())
                cpu[kind][name].append(time.process_time() - start)
    return times, cpu


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """(median, first, third)."""
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return median, first, third


def ratio(over: list[float], under: list[float]) -> tuple[float, float, float]:
    """Quartiles of the ratio within each round."""
    return quartiles([a / b for a, b in zip(over, under)])


def resident(field: str) -> int:
    """Bytes of VmRSS or VmHWM of this process."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1]) * 1024


def scaling_point(backend: str, T: int, threads: int) -> dict:
    """Time and peak extra memory of forward + backward at B1 H4 K=V=64 with everything on."""
    torch.set_num_threads(threads)
    forward = osdn(backend, FULL, gamma=True)
    short = inputs(1, 128, 4, 64)
    measure(forward, short, torch.randn_like(short["v"]))()
    x = inputs(1, T, 4, 64)
    once = measure(forward, x, torch.randn_like(x["v"]))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident
    before = resident("VmRSS")
    once()
    extra = resident("VmHWM") - before
    times = [once() for _ in range(5)]
    tensors = 4 * x["q"].numel() * x["q"].element_size()
    return {"backend": backend, "T": T, "seconds": times, "extra_bytes": extra,
            "over_qkvo": extra / tensors}  # fmt: skip


def decode(rounds: int) -> dict[str, list[float]]:
    """Seconds a token of the step at B1 H4 K=V=64, mean of 50 tokens a round."""
    x = {name: y[:, 0] for name, y in inputs(1, 1, 4, 64).items()}
    times: dict[str, list[float]] = {name: [] for name in (*BACKENDS, "reference")}
    with torch.no_grad():
        for i in range(rounds + 1):
            for backend, seconds in times.items():
                states = {"state": torch.zeros(1, 4, 64, 64), "precond": torch.ones(1, 4, 64)}
                start = time.perf_counter()
                for _ in range(50):
                    online_scaled_delta_step(**x, **states, **FULL, backend=backend)
                if i:  # the first round compiles
                    seconds.append((time.perf_counter() - start) / 50)
    return times


def machine(threads: int) -> dict:
    """What the figures hold for."""
    names = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((x.split(":")[1].strip() for x in names if x.startswith("model name")), "unknown")
    packages = ("torch", "transformers", "numba", "numpy")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "load": os.getloadavg(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def report(result: dict) -> None:
    """The tables."""
    print("| pass | case | ms: median (quartiles) | CPU ms | over transformers | over off |")
    print("|---|---|---|---|---|---|")
    for kind, times in result["times"].items():
        for name, seconds in times.items():
            ms = "{:.2f} ({:.2f} to {:.2f})".format(*(1e3 * x for x in quartiles(seconds)))
            peer = "{:.3f} ({:.3f} to {:.3f})".format(*ratio(seconds, times["transformers"]))
            off = times.get(name.split()[0] + " off")
            own = "" if off is None else "{:.2f} ({:.2f} to {:.2f})".format(*ratio(seconds, off))
            cpu = f"{1e3 * statistics.median(result['cpu'][kind][name]):.1f}"
            print(f"| {kind} | {name} | {ms} | {cpu} | {peer} | {own} |")
    print("\n| backend | T | ms: median | µs a token | peak extra MiB | over q, k, v, o |")
    print("|---|---|---|---|---|---|")
    for point in result["scaling"]:
        seconds = statistics.median(point["seconds"])
        print(
            f"| {point['backend']} | {point['T']} | {1e3 * seconds:.1f} "
            f"| {1e6 * seconds / point['T']:.2f} | {point['extra_bytes'] / 2**20:.1f} "
            f"| {point['over_qkvo']:.2f} |"
        )
    print("\n| step | µs a token: median (quartiles) | reference over it |")
    print("|---|---|---|")
    for name, seconds in result["decode"].items():
        us = "{:.0f} ({:.0f} to {:.0f})".format(*(1e6 * x for x in quartiles(seconds)))
        times = "{:.1f} ({:.1f} to {:.1f})".format(*ratio(result["decode"]["reference"], seconds))
        print(f"| {name} | {us} | {times} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write everything to this JSON file")
    parser.add_argument("--rounds", type=int, default=15, help="timings of each case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--longest", type=int, default=LENGTHS[-1], help="largest T of the scaling; 0: none"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = (2, 2048, 4, 64)
    result = {"machine": machine(args.threads), "size": size}
    result["times"], result["cpu"] = compare(args.rounds, size)
    result["decode"] = decode(args.rounds)
    lengths = [T for T in LENGTHS if args.longest >= T]
    points = [(b, T, args.threads) for b in BACKENDS for T in lengths]
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        result["scaling"] = pool.starmap(scaling_point, points, chunksize=1)
    result["machine"]["load after"] = os.getloadavg()
    print(json.dumps(result["machine"]))
    report(result)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
