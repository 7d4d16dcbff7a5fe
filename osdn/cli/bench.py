"""Time the operator, decoding and a model against their peers and this GPU's ceilings, in one run.

Peers: the same kernels with the preconditioner held (eta = 0: the plain and the gated delta rule),
and where they are installed flash-linear-attention's `chunk_delta_rule` and FlashQLA's
`chunk_gated_delta_rule` (K = V = 128, 16 bits; its plain form is a gate of g = 0), which have no
preconditioner. FlashQLA compiles for about two minutes at each shape. Candidates take turns, round
by round, so that what else the machine does falls on all of them alike; figures are medians over
the rounds, with the spread (third quartile less first, over the median).
"""

from __future__ import annotations

import argparse
import inspect
import statistics
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from osdn.cli.bench_model import model_step
from osdn.errors import UserError
from osdn.ops import online_scaled_delta_rule, online_scaled_delta_step
from osdn.system.files import write_json

PARTS = ("operator", "decode", "table", "packed", "gated", "model")
SHAPES = ((16, 4096, 16, 128), (1, 65536, 16, 128))  # B, T, H, K = V
BATCHES = (1, 8, 64, 256)  # of decoding
# Of the table: T from 1k to 256k, batch × heads from 8 to 512, at most 4 Mi token-heads each.
TABLE = tuple(
    (B, T, 8, 128)
    for B in (1, 8, 64)
    for T in (1024, 4096, 16384, 65536, 262144)
    if B * 8 * T <= 2**22
)
TABLE_NAMES = ("osdn", "delta rule (eta 0)", "FLA chunk_delta_rule", "FlashQLA")
PACKED = {"one of 40,000": (40_000,), "1,000 of 40": (40,) * 1000}  # lengths
GATED_SHAPE = (4, 4096, 16, 128)
GATED_NAMES = ("osdn decay APF", "gated delta rule (eta 0)", "FlashQLA gated")
BOX = {"precond_min": 0.0, "precond_max": 2.0}  # unit keys and d_1 = 1 never leave it
TIGHT = {"precond_min": 0.9, "precond_max": 1.1}  # left at once from d_1 = 1 ± 0.3
Candidates = dict[str, tuple[Callable[..., Tensor], dict[str, Tensor]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes", nargs="+", type=_shape, default=SHAPES, metavar="B,T,H,D",
        help="operator sizes, D = K = V (default: 16,4096,16,128 1,65536,16,128)",
    )  # fmt: skip
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=["operator", "decode", "model"],
        help="what to time; table: the operator over lengths and batches; packed: short sequences; "
        "gated: beside transformers' PyTorch functions (default: operator decode model)",
    )  # fmt: skip
    parser.add_argument(
        "--model", type=_model, default=(8, 4096, 24), metavar="B,T,LAYERS",
        help="batch and depth of the model step, of the 340M model's width (default: 8,4096,24)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=12, help="turns of each candidate")
    parser.add_argument("--output", type=Path, help="write all figures there as JSON")


def _shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(x) for x in text.split(","))
    if len(sizes) != 4:
        raise argparse.ArgumentTypeError(f"expected B,T,H,D, got {text!r}")
    return sizes


def _model(text: str) -> tuple[int, ...]:
    sizes = tuple(int(x) for x in text.split(","))
    if len(sizes) != 3:
        raise argparse.ArgumentTypeError(f"expected B,T,LAYERS, got {text!r}")
    return sizes


def run(args: argparse.Namespace) -> None:
    """Run every comparison, print the tables and write the JSON."""
    if not torch.cuda.is_available():
        raise UserError("no CUDA device found; this command times GPU kernels")
    report: dict[str, Any] = {"versions": versions(), "ceilings": ceilings()}
    copy, matmul = report["ceilings"]["copy_TBps"], report["ceilings"]["matmul_TFLOPs"]
    print(f"{report['versions']}\ncopy {copy:.2f} TB/s, bf16 matmul {matmul:.0f} TFLOP/s")
    if "operator" in args.parts:
        report["operator"] = [row for shape in args.shapes for row in operator(shape, args.rounds)]
    if "decode" in args.parts:
        report["decode"] = [row for B in BATCHES for row in decode(B, args.rounds, copy)]
    if "table" in args.parts:
        shapes = [operator(shape, args.rounds, TABLE_NAMES) for shape in TABLE]
        report["table"] = [row for rows in shapes for row in rows]
    if "packed" in args.parts:
        report["packed"] = [row for name in PACKED for row in packed(name, args.rounds)]
    if "gated" in args.parts:
        report["gated"] = operator(GATED_SHAPE, args.rounds, GATED_NAMES, _transformers_gated)
    if "model" in args.parts:
        report["model"] = model_step(args.model, args.rounds, take_turns)
    if args.output:
        write_json(args.output, report)


def versions() -> dict[str, str]:
    """The GPU and the libraries behind the figures."""
    found = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    for name in ("triton", "flash-linear-attention", "flash-qla", "tilelang"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def take_turns(
    candidates: dict[str, Callable[[], object]], rounds: int
) -> dict[str, tuple[float, float]]:
    """(median milliseconds, spread) of each, timed by device events, one call a turn."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        for _ in range(3):
            call()
    for _ in range(rounds):
        for name, call in candidates.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            call()  # the first after another's turn finds the caches in another state
            start.record()
            call()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    result = {}
    for name, ms in times.items():
        low, middle, high = statistics.quantiles(ms, n=4)
        result[name] = (middle, (high - low) / middle)
    return result


def ceilings() -> dict[str, float]:
    """What this GPU reaches in a large copy (bytes read and written) and a large bf16 product."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    b = torch.empty_like(a)
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = take_turns({"copy": lambda: b.copy_(a), "matmul": lambda: x @ y}, 10)
    return {
        "copy_TBps": 2 * a.numel() / times["copy"][0] / 1e9,
        "matmul_TFLOPs": 2 * 8192**3 / times["matmul"][0] / 1e9,
    }


def make_inputs(B: int, T: int, H: int, K: int) -> dict[str, Tensor]:
    """bf16 inputs of the operator with K = V, unit q and k, with gradients asked for."""
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda")

    inputs = {
        "q": normalize(normal(B, T, H, K), dim=-1).bfloat16(),
        "k": normalize(normal(B, T, H, K), dim=-1).bfloat16(),
        "v": normal(B, T, H, K).bfloat16(),
        "beta": normal(B, T, H).sigmoid(),
    }
    return {name: x.requires_grad_() for name, x in inputs.items()}


def _fla_delta_rule() -> Callable[..., Any] | None:
    try:
        from fla.ops.delta_rule import chunk_delta_rule
    except ImportError:
        return None
    return chunk_delta_rule


def _flash_qla() -> Callable[..., Any] | None:
    try:
        from flash_qla import chunk_gated_delta_rule
    except ImportError:
        return None
    return chunk_gated_delta_rule


def _transformers_gated(shape: tuple[int, ...]) -> Candidates:
    """The gated delta rule as transformers runs it without flash-linear-attention."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    plain = inspect.unwrap(torch_chunk_gated_delta_rule)  # its wrapper would take FLA's

    def rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
        return plain(q, k, v, g, beta)[0]

    gate = logsigmoid(torch.randn(shape[:3], device="cuda") + 4).requires_grad_()
    return {"transformers, PyTorch": (rule, make_inputs(*shape) | {"g": gate})}


def variants(shape: tuple[int, ...], cu_seqlens: Tensor | None = None) -> Candidates:
    """Each candidate of the operator: a function of its tensors, and the tensors."""
    inputs = make_inputs(*shape)
    packs = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
    precond = torch.ones(shape[2], shape[3], device="cuda", requires_grad=True)
    apart = (1 + 0.3 * torch.randn_like(precond.detach())).requires_grad_()
    log_gamma = logsigmoid(torch.randn(shape[:3], device="cuda") + 6.9).requires_grad_()
    log_alpha = logsigmoid(torch.randn(shape[:3], device="cuda") + 4).requires_grad_()

    def ours(**options: Any) -> Callable[..., Tensor]:
        options |= {"backend": "triton"} | packs
        return lambda **tensors: online_scaled_delta_rule(**tensors, **options)[0]

    learned = inputs | {"initial_precond": precond}
    forgetting = learned | {"log_gamma": log_gamma}
    found = {
        "osdn": (ours(), learned),
        "osdn beta-aware APF": (ours(beta_aware=True), forgetting),
        "osdn decay APF": (ours(beta_aware=True), forgetting | {"log_alpha": log_alpha}),
        "osdn box": (ours(**BOX), learned),
        "osdn box left": (ours(**TIGHT), learned | {"initial_precond": apart}),
        "gated delta rule (eta 0)": (ours(eta=0.0), inputs | {"log_alpha": log_alpha}),
        "delta rule (eta 0)": (ours(eta=0.0), inputs),
    }
    fla = _fla_delta_rule()
    if fla is not None:
        half = inputs | {"beta": inputs["beta"].detach().bfloat16().requires_grad_()}
        found["FLA chunk_delta_rule"] = (lambda **tensors: fla(**tensors, **packs)[0], half)
    flash = _flash_qla()
    if flash is not None and shape[3] == 128:
        none = torch.zeros_like(log_alpha)
        found["FlashQLA gated"] = (lambda **x: flash(**x, **packs)[0], inputs | {"g": log_alpha})
        found["FlashQLA"] = (lambda **x: flash(**x, g=none, **packs)[0], inputs)
    return found


def packed(name: str, rounds: int) -> list[dict[str, Any]]:
    """The operator over packed sequences of the lengths that PACKED names."""
    lengths = torch.tensor((0, *PACKED[name]), device="cuda")
    print(f"\n{name} tokens, packed:", end="")
    only = (*TABLE_NAMES, "osdn beta-aware APF")
    shape = (1, int(lengths.sum()), 16, 128)
    return operator(shape, rounds, only, cu_seqlens=lengths.cumsum(0))


def operator(
    shape: tuple[int, ...],
    rounds: int,
    only: tuple[str, ...] | None = None,
    more: Callable[[tuple[int, ...]], Candidates] | None = None,
    cu_seqlens: Tensor | None = None,
) -> list[dict[str, Any]]:
    """Forward, forward and backward, and peak extra memory of every variant at one size."""
    found = {n: x for n, x in variants(shape, cu_seqlens).items() if only is None or n in only}
    if more is not None:
        found |= more(shape)
    do = torch.randn(shape, device="cuda").bfloat16()

    def forward(name: str) -> None:
        call, tensors = found[name]
        with torch.no_grad():
            call(**tensors)

    def both(name: str) -> None:
        call, tensors = found[name]
        torch.autograd.grad(call(**tensors), list(tensors.values()), do)

    calls: dict[str, Callable[[], object]] = {}
    for name in found:
        calls[f"{name}|forward"] = partial(forward, name)
        calls[f"{name}|both"] = partial(both, name)
    times = take_turns(calls, rounds)
    rows = []
    for name in found:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both(name)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        (fwd, fwd_spread), (all_, all_spread) = (times[f"{name}|{k}"] for k in ("forward", "both"))
        rows.append({
            "shape": shape, "name": name, "forward_ms": fwd, "forward_spread": fwd_spread,
            "both_ms": all_, "both_spread": all_spread, "peak_MiB": peak,
        })  # fmt: skip
    _print_operator(shape, rows)
    return rows


def _print_operator(shape: tuple[int, ...], rows: list[dict[str, Any]]) -> None:
    peer = rows[-1]
    print(f"\nB{shape[0]} T{shape[1]} H{shape[2]} D{shape[3]}, over {peer['name']}")
    for row in rows:
        cells = [
            f"{row[key]:9.3f} {row[key] / peer[key]:6.2f}×"
            for key in ("forward_ms", "both_ms", "peak_MiB")
        ]
        print(f"{row['name']:24s} forward {cells[0]}  both {cells[1]}  MiB {cells[2]}", flush=True)


def decode(
    B: int, rounds: int, copy_TBps: float, H: int = 16, K: int = 128
) -> list[dict[str, Any]]:
    """One token for B sequences, captured in a CUDA graph, over the time to move the state."""
    inputs: dict[str, Any] = {n: x.detach()[:, 0] for n, x in make_inputs(B, 1, H, K).items()}
    S = torch.randn(B, H, K, K, device="cuda")
    d = torch.ones(B, H, K, device="cuda")

    def step() -> None:
        online_scaled_delta_step(**inputs, state=S, precond=d, backend="triton")

    with torch.no_grad():
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(20):
                step()
        ms, spread = take_turns({"step": graph.replay}, rounds)["step"]
    floor = 2 * S.numel() * 4 / copy_TBps / 1e9
    row = {"B": B, "H": H, "K": K, "us": ms * 50, "spread": spread, "floor_us": floor * 1e3}
    print(
        f"decode B{B} H{H} D{K}: {row['us']:.1f} µs, {row['us'] / row['floor_us']:.2f}× moving the "
        f"state ({row['floor_us']:.1f} µs)",
        flush=True,
    )
    return [row]
