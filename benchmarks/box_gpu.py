"""Time the operator without a box, with one that never clips, and with one that clips at once.

    python benchmarks/box_gpu.py

Forward and backward, APF, K = V = 128, bfloat16: medians of CUDA events, and by kernel where the
box clips, by the profiler.
"""

from statistics import median

import torch
from torch.nn.functional import logsigmoid, normalize

from osdn.ops import online_scaled_delta_rule

SHAPES = ((16, 4096, 16), (1, 65536, 16))
K = 128
# d starts at 1, and unit keys leave it there.
BOXES = {
    "no box": {},
    "never clips": {"precond_min": -100.0, "precond_max": 100.0},
    "clips at once": {"precond_min": 0.0, "precond_max": 0.99},
}


def call(B, T, H, box):
    """A function that runs the operator forward and backward on random data."""
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, device="cuda")

    q, k = (normalize(normal(B, T, H, K), dim=-1) for _ in range(2))
    given = {"q": q.bfloat16(), "k": k.bfloat16(), "v": normal(B, T, H, K).bfloat16()}
    given |= {"beta": normal(B, T, H).sigmoid(), "log_gamma": logsigmoid(normal(B, T, H) + 6.9)}
    for x in given.values():
        x.requires_grad_()
    do = normal(B, T, H, K).bfloat16()

    def run():
        o = online_scaled_delta_rule(**given, backend="triton", **box)[0]
        torch.autograd.grad(o, list(given.values()), do)

    return run


def milliseconds(run, calls=20):
    """(median, least, most) of one call."""
    for _ in range(3):
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in events]
    return median(times), min(times), max(times)


def by_kernel(run, calls=5):
    """Milliseconds of one call by kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    spent = {x.key: x.device_time_total / calls / 1e3 for x in profile.key_averages()}
    return sorted(((x, name) for name, x in spent.items() if x > 0.005), reverse=True)


def main():
    for shape in SHAPES:
        print("\nB{} T{} H{}".format(*shape))
        for name, box in BOXES.items():
            run = call(*shape, box)
            print("{:14s} {:7.2f} ms ({:.2f} to {:.2f})".format(name, *milliseconds(run)))
        for ms, kernel in by_kernel(run):
            print(f"    {ms:7.3f} {kernel[:60]}", flush=True)


if __name__ == "__main__":
    main()
