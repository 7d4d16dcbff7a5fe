"""Time every Triton kernel alone under a grid of launch configurations (osdn.ops.triton.config).

    python benchmarks/op_gpu.py                  # both shapes, every stage
    python benchmarks/op_gpu.py memory scan      # only these
    python benchmarks/op_gpu.py --decay          # with log_alpha
    python benchmarks/op_gpu.py --defaults       # only as they are launched

Configurations are compiled first, in parallel processes that share Triton's cache; then every stage
is timed at each shape, and its outputs under each configuration compared with the default's, since
a compiler error shows in one configuration and not in the next.
"""

import argparse
import itertools
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from torch.nn.functional import logsigmoid, normalize
from triton.runtime.jit import JITFunction

from osdn.ops import triton as kernels
from osdn.ops.numerics import relative_error
from osdn.ops.operands import Operands, Options, Token
from osdn.ops.triton import (
    chunk_scan,
    chunk_scan_reverse,
    clipped_gradients,
    clipped_keys,
    cut,
    gradients,
    memory,
    memory_reverse,
    saved_like,
    token_scan,
    token_scan_reverse,
    write_keys,
)
from osdn.ops.triton import chunks as cutting
from osdn.ops.triton.config import CONFIG
from osdn.ops.triton.gates import Decay
from osdn.ops.triton.precond_clipped import inside_like
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
    "inverse": grid(num_warps=[1, 2, 4], BK=[16, 32], maxnreg=[128, 168, 255]),
    "scan": grid(num_warps=[2, 4, 8], STAGES=[2, 3, 4]),
    "transfer": grid(num_warps=[4, 8], num_stages=[1, 2], BV=[64, 128]),
    "token_scan": grid(num_warps=[1]),
    "token_scan_reverse": grid(num_warps=[1]),
    "clipped_keys": grid(num_warps=[1, 2], maxnreg=[64, 128]),
    "clipped_gradients": grid(num_warps=[1, 2], SUB=[8, 16], maxnreg=[128, 168, 255]),
    "write_keys": grid(num_warps=[1, 2, 4], BK=[16, 32], maxnreg=[128, 168, 255]),
    "memory": grid(num_warps=[4, 8], num_stages=[1, 2], BV=[64, 128]),
    "memory_reverse": grid(num_warps=[4, 8], num_stages=[1, 2], BV=[64, 128]),
    "gradients": grid(num_warps=[4, 8], num_stages=[1, 2], BK=[64, 128], BV=[64, 128]),
    "couple": grid(num_warps=[4, 8], BK=[32, 64, 128]),
    "scan_reverse": grid(num_warps=[2, 4, 8], STAGES=[2, 3, 4]),
    "precond_gradients": grid(num_warps=[2, 4, 8], BK=[32, 64, 128], maxnreg=[128, 168, 255]),
    "step": grid(num_warps=[4, 8, 16], BV=[32, 64, 128]),
}


def stages(B, T, H, decays):
    """By name, a call that runs one kernel on real data and returns what it wrote."""
    torch.manual_seed(0)
    shape = (B, T, H, K)
    q, k, v, do = (torch.randn(shape, device="cuda") for _ in range(4))
    q, k = normalize(q, dim=-1).bfloat16(), normalize(k, dim=-1).bfloat16()
    v, do = v.bfloat16(), do.bfloat16()
    beta = torch.rand(B, T, H, device="cuda")
    S0, d0 = torch.zeros(B, H, K, K, device="cuda"), torch.ones(B, H, K, device="cuda")
    chunks = cut(B, T, None)
    gamma = logsigmoid(torch.randn(B, T, H, device="cuda") + 6.9)
    alpha = logsigmoid(torch.randn(B, T, H, device="cuda") + 3.0) if decays else None
    saved = saved_like(Operands(q, k, v, beta, gamma, alpha, S0, d0, None), OPTIONS, True)
    x, starts, w, A, clipped, _, *pair, e, kept, reads = saved[:11]
    pair, kept = Decay(*pair), (e, kept, reads)
    decay = pair if decays else None
    gates = (k, beta, gamma)
    _, solve, M = chunk_scan(*gates, d0, x, starts, chunks, OPTIONS)
    write = (*gates, alpha, x, starts, w, A, pair, chunks, OPTIONS)
    write_keys(*write)
    *_, maps = memory(q, k, w, v, A, decay, S0, *kept, chunks, OPTIONS)
    back = (q, k, w, A, decay, e, do, S0, maps, reads, chunks, OPTIONS)
    dv, dw, _, parts = memory_reverse(*back)
    dbeta, dgamma = torch.empty_like(beta), torch.empty_like(beta)
    last = (q, k, w, alpha, decay, e, do, dv, kept[1], parts, chunks, OPTIONS)
    _, dk, _ = gradients(*last)
    state0 = torch.randn(64, H, K, K, device="cuda")
    precond0 = torch.ones(64, H, K, device="cuda")
    row = [t.view(-1, H, t.shape[-1])[:64].contiguous() for t in (q, k, v)]

    def solved(A):
        return A.view(-1, 64, H, 64).transpose(1, 2)[:256]

    def inverse():
        return (solved(chunk_inverse(*gates, chunks, OPTIONS)[0]),)

    def keys():
        write_keys(*write)
        return w, solved(A)

    def scan():
        return (chunk_scan(*gates, d0, x, starts, chunks, OPTIONS)[0], x, starts)

    # The box: every token, as where it clips in each sequence's first chunk, one kernel after the
    # other, each on what those before it left.
    boxed = (k, beta, gamma.exp())
    first = torch.arange(B, device="cuda", dtype=torch.int32) * (chunks.bound // B)
    first = first[:, None].expand(B, H).contiguous()
    x2, starts2, w2, final, lam = (t.clone() for t in (x, starts, w, d0, starts))
    inside, gs = inside_like(k, chunks.bound, True), torch.empty_like(x)

    def tokens():
        token_scan(*boxed, x2, starts2, final, first, chunks, BOX)
        return x2, starts2, final

    def tokens_reverse():
        given = (dw, inside, d0, gs, lam, first, chunks, BOX)
        return token_scan_reverse(*boxed, *given), gs, lam

    def box_keys():
        clipped_keys(*boxed, x2, starts2, w2, inside, first, chunks, BOX, found=True)
        return (w2,)

    def box_gradients():
        part = dk.clone()
        found = (part, dbeta, dgamma)
        clipped_gradients(*boxed, x2, starts2, inside, dw, gs, lam, *found, first, chunks, BOX)
        return found

    for call in (tokens, box_keys, tokens_reverse):
        call()

    def reverse():
        part = dk.clone()
        found = chunk_scan_reverse(
            *gates, x, starts, solve, M, dw, d0, part, dbeta, dgamma, clipped, chunks, OPTIONS
        )
        return dbeta, dgamma, found, part

    def step():
        state, precond = state0.clone(), precond0.clone()
        token = Token(*row, beta.view(-1, H)[:64], None, None, state, precond, None, None)
        o = decode(token, OPTIONS)
        return o, state, precond

    return {
        "inverse": inverse,
        "scan": scan,
        "transfer": lambda: (transfers(*gates, solve, None, chunks, OPTIONS),),
        "token_scan": tokens,
        "token_scan_reverse": tokens_reverse,
        "clipped_keys": box_keys,
        "clipped_gradients": box_gradients,
        "write_keys": keys,
        "memory": lambda: memory(q, k, w, v, A, decay, S0, *kept, chunks, OPTIONS)[:2],
        "memory_reverse": lambda: memory_reverse(*back)[:3],
        "gradients": lambda: [x for x in gradients(*last) if x is not None],
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
    names = {f"{stage}_kernel", "dlog_alpha_kernel" if stage == "gradients" else None}
    return sum(x.device_time_total for x in profile.key_averages() if x.key in names) / calls / 1e3


def error(actual, expected):
    """The largest relative error over a stage's outputs."""
    errors = [relative_error(a, b) for a, b in zip(actual, expected)]
    return max(x if x == x else float("inf") for x in errors)


def compile_all(names, grids, decays):
    """Compile every stage under each configuration, by as many processes as there are cores."""
    jobs = [(name, config, decays) for name in names for config in (CONFIG[name], *grids[name])]
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 16), get_context("spawn")) as pool:
        for (name, config, _), problem in zip(jobs, pool.map(compile_one, jobs)):
            if problem:
                print(f"{name} {config}: {problem[:80]}", flush=True)


def compile_one(job):
    """Compile one kernel, launching nothing; the first line of what goes wrong."""
    name, CONFIG[job[0]], decays = job
    original = JITFunction.run

    def run(self, *args, grid, warmup=False, **options):
        if self.fn.__name__ == f"{name}_kernel":
            original(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = run
    H, options = SHAPES[0][2], {"dtype": torch.float32, "device": "cuda"}
    try:
        for T in (64, 64 * cutting.LONG):  # the second is walked in segments
            q, k, v = (torch.empty(1, T, H, K, device="cuda").bfloat16() for _ in range(3))
            beta, S, d = (torch.empty(*n, **options) for n in ((1, T, H), (1, H, K, K), (1, H, K)))
            alpha = beta if decays else None
            given = Operands(q, k, v, beta, beta, alpha, S, d, None)
            for rule in (OPTIONS, BOX):
                *_, saved = kernels.forward(given, rule, True)
                kernels.backward(v, S, d, given, saved, rule)
        row = (x[:, 0].contiguous() for x in (q, k, v, beta, beta))
        kernels.step(Token(*row, None, S, d, None, None), OPTIONS)
    except Exception as problem:  # too much shared memory, say
        return str(problem).splitlines()[0]
    finally:
        JITFunction.run = original
    return None


def main():
    """Print, for every stage and shape, its configurations from the fastest."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", default=list(GRIDS), help="stages (default: all)")
    parser.add_argument("--decay", action="store_true", help="with log_alpha")
    parser.add_argument("--defaults", action="store_true", help="only the default configurations")
    args = parser.parse_args()
    names, grids = args.names, {n: [] if args.defaults else grid for n, grid in GRIDS.items()}
    compile_all(names, grids, args.decay)
    defaults = {name: dict(config) for name, config in CONFIG.items()}
    for shape in SHAPES:
        calls = stages(*shape, args.decay)
        print(
            f"\nB{shape[0]} T{shape[1]} H{shape[2]} D{K}, milliseconds; error against the default"
        )
        for name in names:
            expected = calls[name]()
            expected = tuple(x.clone() for x in expected)
            print(f"{name:18s} default {milliseconds(calls[name], name):.3f} {defaults[name]}")
            found = []
            for config in grids[name]:
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
    main()
