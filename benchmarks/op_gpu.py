"""Time every Triton kernel alone under a grid of launch configurations (osdn.ops.triton.config).

    python benchmarks/op_gpu.py                  # both shapes, every stage
    python benchmarks/op_gpu.py memory states    # only these

Configurations are compiled first, in parallel processes that share Triton's cache; then every stage
is timed at each shape, and its outputs under each configuration compared with the default's, since
a compiler error shows in one configuration and not in the next.
"""

import itertools
import subprocess
import sys

import torch
from torch.nn.functional import normalize

from osdn.ops.operands import Operands, Options, Token
from osdn.ops.triton import (
    chunk_scan,
    chunk_scan_reverse,
    cut,
    gradients,
    memory,
    memory_reverse,
    saved_like,
    states,
    token_scan,
    token_scan_reverse,
    write_keys,
)
from osdn.ops.triton.config import CONFIG
from osdn.ops.triton.precond_forward import chunk_inverse
from osdn.ops.triton.precond_segments import transfers
from osdn.ops.triton.step import decode

SHAPES = ((16, 4096, 16), (1, 65536, 16))
K = 128
OPTIONS = Options(1.0, False, None, None, K**-0.5)
BOX = OPTIONS._replace(precond_min=0.0, precond_max=2.0)


def grid(**options):
    return [dict(zip(options, values)) for values in itertools.product(*options.values())]


GRIDS = {
    "inverse": grid(num_warps=[1], BK=[16, 32], maxnreg=[96, 128, 168, 255]),
    "scan": grid(num_warps=[2, 4, 8], STAGES=[2, 3, 4]),
    "transfer": grid(num_warps=[4, 8], num_stages=[1, 2], BV=[64, 128]),
    "token_scan": grid(num_warps=[1]),
    "write_keys": grid(num_warps=[1], BK=[16, 32], maxnreg=[96, 128, 168, 255]),
    "memory": grid(num_warps=[4, 8], num_stages=[1, 2], BV=[64, 128]),
    "states": grid(num_warps=[4, 8], num_stages=[2, 3], BK=[64, 128], BV=[64, 128]),
    "memory_reverse": grid(num_warps=[4, 8], num_stages=[1, 2], BV=[64, 128]),
    "gradients": grid(num_warps=[4, 8], num_stages=[1, 2, 3], BK=[64, 128], BV=[64]),
    "couple": grid(num_warps=[4, 8], BK=[32, 64, 128]),
    "scan_reverse": grid(num_warps=[2, 4, 8], STAGES=[2, 3, 4]),
    "precond_gradients": grid(num_warps=[4, 8], BK=[32, 64, 128]),
    "step": grid(num_warps=[4, 8, 16], BV=[32, 64, 128]),
}


def stages(B, T, H):
    """By name, a call that runs one kernel on real data and returns what it wrote."""
    torch.manual_seed(0)
    shape = (B, T, H, K)
    q, k, v, do = (torch.randn(shape, device="cuda") for _ in range(4))
    q, k = normalize(q, dim=-1).bfloat16(), normalize(k, dim=-1).bfloat16()
    v, do = v.bfloat16(), do.bfloat16()
    beta = torch.rand(B, T, H, device="cuda")
    S0, d0 = torch.zeros(B, H, K, K, device="cuda"), torch.ones(B, H, K, device="cuda")
    chunks = cut(B, T, None)
    saved = saved_like(Operands(q, k, v, beta, None, None, S0, d0, None), OPTIONS, True)
    x, starts, w, ka, A, clipped, e = saved[:7]
    _, solve, M = chunk_scan(k, beta, None, d0, x, starts, chunks, OPTIONS)
    write_keys(k, beta, None, x, starts, w, A, ka, clipped, chunks, OPTIONS, repair=False)
    *_, parts = memory(q, w, ka, v, A, S0, e, chunks, OPTIONS)
    dv, dS, _ = memory_reverse(q, w, ka, A, do, S0, parts, chunks, OPTIONS)
    S = states(w, e, S0, parts, chunks)
    dbeta = torch.empty_like(beta)
    _, dk, dw = gradients(q, k, w, e, do, dv, S, dS, chunks, OPTIONS)
    state0 = torch.randn(64, H, K, K, device="cuda")
    precond0 = torch.ones(64, H, K, device="cuda")
    row = [t.view(-1, H, t.shape[-1])[:64].contiguous() for t in (q, k, v)]

    def solved(A):
        return A.view(-1, 64, H, 64).transpose(1, 2)[:256]

    def inverse():
        return (solved(chunk_inverse(k, beta, None, chunks, OPTIONS)),)

    def keys():
        write_keys(k, beta, None, x, starts, w, A, ka, clipped, chunks, OPTIONS, repair=False)
        return w, ka, solved(A)

    def scan():
        return (chunk_scan(k, beta, None, d0, x, starts, chunks, OPTIONS)[0], x, starts)

    def tokens():
        """Every token, as where the box clips in each sequence's first chunk."""
        w2, x2, starts2, part, final = (t.clone() for t in (w, x, starts, dk, d0))
        first = torch.arange(B, device="cuda", dtype=torch.int32) * (chunks.bound // B)
        first = first[:, None].expand(B, H).contiguous()
        token_scan(k, beta, None, w2, x2, starts2, final, first, chunks, BOX)
        gradient = token_scan_reverse(
            k, beta, None, x2, starts2, dw, d0, part, dbeta, None, first, chunks, BOX
        )
        return w2, x2, final, gradient, part, dbeta

    def reverse():
        part = dk.clone()
        found = chunk_scan_reverse(
            k, beta, None, x, starts, solve, M, dw, d0, part, dbeta, None, clipped, chunks, OPTIONS
        )
        return dbeta, found, part

    def step():
        state, precond = state0.clone(), precond0.clone()
        token = Token(*row, beta.view(-1, H)[:64], None, None, state, precond, None, None)
        o = decode(token, OPTIONS)
        return o, state, precond

    return {
        "inverse": inverse,
        "scan": scan,
        "transfer": lambda: (transfers(k, beta, None, solve, None, chunks, OPTIONS),),
        "token_scan": tokens,
        "write_keys": keys,
        "memory": lambda: memory(q, w, ka, v, A, S0, e, chunks, OPTIONS)[:2],
        "states": lambda: (states(w, e, S0, parts, chunks),),
        "memory_reverse": lambda: memory_reverse(q, w, ka, A, do, S0, parts, chunks, OPTIONS),
        "gradients": lambda: gradients(q, k, w, e, do, dv, S, dS, chunks, OPTIONS),
        "couple": reverse,
        "scan_reverse": reverse,
        "precond_gradients": reverse,
        "step": step,
    }  # fmt: skip


def milliseconds(call, stage, calls=5):
    """Device time of one call's kernels that carry the stage's name, by the profiler."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    names = {f"{stage}_kernel"} | (
        {"token_scan_reverse_kernel"} if stage == "token_scan" else set()
    )
    return sum(x.device_time_total for x in profile.key_averages() if x.key in names) / calls / 1e3


def error(actual, expected):
    """The largest relative error over a stage's outputs."""
    pairs = zip(actual, expected)
    errors = [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in pairs]
    return max(x if x == x else float("inf") for x in errors)


def compile_all(names):
    """Run each stage under each configuration at a tiny size, one process a stage."""
    workers = [
        subprocess.Popen([sys.executable, __file__, "--compile", f"{name}:{i}:4"])
        for name in names
        for i in range(4)
    ]
    for worker in workers:
        worker.wait()


def compile_part(part):
    """Every n-th configuration of one stage, from the i-th on."""
    name, i, n = part.split(":")
    call = stages(1, 64, SHAPES[0][2])[name]
    for config in GRIDS[name][int(i) :: int(n)]:
        CONFIG[name] = config
        try:
            call()
            torch.cuda.synchronize()
        except Exception as problem:  # too much shared memory, say: reported when it is timed
            print(f"{name} {config}: {str(problem).splitlines()[0][:80]}", flush=True)


def main(names):
    """Print, for every stage and shape, its configurations from the fastest."""
    compile_all(names)
    defaults = {name: dict(config) for name, config in CONFIG.items()}
    for shape in SHAPES:
        calls = stages(*shape)
        print(
            f"\nB{shape[0]} T{shape[1]} H{shape[2]} D{K}, milliseconds; error against the default"
        )
        for name in names:
            expected = calls[name]()
            expected = tuple(x.clone() for x in expected)
            print(f"{name:18s} default {milliseconds(calls[name], name):.3f} {defaults[name]}")
            found = []
            for config in GRIDS[name]:
                CONFIG[name] = config
                try:
                    wrong = error(calls[name](), expected)
                    found.append((milliseconds(calls[name], name), wrong, config))
                except Exception:
                    continue
            CONFIG[name] = defaults[name]
            for ms, wrong, config in sorted(found, key=lambda x: x[0])[:6]:
                flag = "" if wrong < 1e-2 else "  WRONG"
                print(f"    {ms:8.3f}  {wrong:.1e}{flag}  {config}", flush=True)
            bad = [config for _, wrong, config in found if not wrong < 1e-2]
            if bad:
                print(f"    wrong: {bad}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compile"]:
        compile_part(sys.argv[2])
    else:
        main(sys.argv[1:] or list(GRIDS))
