"""Generation by the 374 M model on one GPU: the captured step beside the layers and a Llama.

python benchmarks/generate_gpu.py [--parts first,check,time,prefill,profile,llama] [--seconds 300]

first    seconds of the first and the second `generate` of a process, prompt of 1,024 tokens; with
         TRITON_CACHE_DIR set to an empty directory that includes all compilation.
check    tokens of the step and of the layers (disable_compile=True) in float32: 50 left-padded
         prompts greedily, sampling, beams; in bfloat16 the error of both against float32.
time     ms a token by `generate`, greedy, by batch size and context; the graph's replay alone.
prefill  ms for one prompt.
profile  one replay by kernel.
llama    transformers' Llama of the same size, static cache and torch.compile.

A token's time is the median between two calls of a logits processor in one `generate`, whose loop
waits for the device at each token. What does not fit into --seconds is left out and said.
"""

import argparse
import itertools
import statistics
import time
from collections import Counter
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LogitsProcessor, LogitsProcessorList

from osdn import OSDNConfig, OSDNForCausalLM
from osdn.model import decoding
from osdn.ops.numerics import relative_error

SIZES = {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 2816,
         "vocab_size": 32000}  # fmt: skip
started = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="first,check,time,prefill,profile,llama")
    parser.add_argument("--seconds", type=float, default=300)
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for part in args.parts.split(","):
        spent = time.perf_counter() - started
        if spent > args.seconds:
            print(f"{part}: left out after {spent:.0f} s")
            continue
        PARTS[part]()
        print(f"[{part} ended at {time.perf_counter() - started:.0f} s]", flush=True)


def build(dtype: torch.dtype = torch.bfloat16) -> OSDNForCausalLM:
    """The 374 M model with APF and random weights, the same ones in every dtype."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model: Any = OSDNForCausalLM(OSDNConfig(num_heads=8, pad_token_id=0, **SIZES)).eval()
    return model.to(dtype)


def prompt(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 32000, (batch, length), generator=generator).cuda()


def generate(model: Any, ids: torch.Tensor, new: int, **options: Any) -> torch.Tensor:
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids)} | options
    return model.generate(ids, max_new_tokens=new, min_new_tokens=new, **options)


def first() -> None:
    model, ids = build(), prompt(1, 1024)
    for which in ("first", "second"):
        torch.cuda.synchronize()
        began = time.perf_counter()
        generate(model, ids, 2)
        torch.cuda.synchronize()
        print(f"{which} generate of two tokens: {time.perf_counter() - began:.2f} s", flush=True)


def check() -> None:
    model = build(torch.float32)
    ids, lengths = prompt(50, 60), torch.randint(5, 61, (50, 1)).cuda()
    mask = (torch.arange(60, device="cuda") >= 60 - lengths).long()
    cases: dict[str, tuple[torch.Tensor, int, dict[str, Any]]] = {
        "greedy, 50 left-padded prompts": (ids * mask, 24, {"attention_mask": mask}),
        "greedy, one prompt": (ids[:1], 24, {}),
        "sampling, 4 prompts": (ids[:4], 24, {"do_sample": True, "top_k": 50, "temperature": 0.8}),
        "4 beams, 2 prompts": (ids[:2], 16, {"num_beams": 4}),
    }
    for name, (given, new, options) in cases.items():
        found = []
        for off in (False, True):
            torch.manual_seed(3)
            began = time.perf_counter()
            found.append(generate(model, given, new, disable_compile=off, **options))
            print(f"  {name}: {time.perf_counter() - began:.2f} s, disable_compile={off}")
        same = found[0].shape == found[1].shape and torch.equal(*found)
        print(f"float32, {name}: {'identical' if same else 'DIFFERENT'}", flush=True)
        if not same:
            print((found[0] == found[1]).all(1).float().mean().item(), "of the rows agree")
    exact = forced(model, captured=True)
    layers = forced(model, captured=False)
    print(f"float32, logits of 32 tokens: step over layers {relative_error(exact, layers):.2e}")
    for dtype in (torch.bfloat16, torch.float16):
        model = build(dtype)
        for batch in (1, 8, 24, 70):  # every kind of tile
            off = [
                relative_error(forced(model, captured, batch)[:8], layers.expand(-1, batch, -1)[:8])
                for captured in (True, False)
            ]
            print(f"{dtype}, batch {batch}: error of the step {off[0]:.4f}, layers {off[1]:.4f}")


@torch.no_grad()
def forced(model: Any, captured: bool, batch: int = 1) -> torch.Tensor:
    """Logits [T, batch, vocabulary] of given tokens, one at a time after 16 others."""
    ids = prompt(1, 48, seed=7).expand(batch, -1)
    cache = model(ids[:, :16]).past_key_values
    cache.captured = captured
    rows = [
        model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits[:, 0].float()
        for t in range(16, 48 if batch == 1 else 24)
    ]
    return torch.stack(rows)


def times() -> None:
    model = build()
    print("ms a token by generate                 step   replay   layers  first use, s")
    shapes = ((1, 1024), (8, 1024), (32, 1024), (128, 1024), (1, 32768), (1, 262144))
    for batch, context in shapes:
        ids = prompt(batch, context)
        began = time.perf_counter()
        generate(model, ids, 2)
        first = time.perf_counter() - began
        step = per_token(model, ids, 200)
        layers = per_token(model, ids, 12, disable_compile=True)
        replay = replayed(decoding.captured_steps[model][batch])
        print(
            f"batch {batch:4d}, context {context:6d}             "
            f"{step:8.3f} {replay:8.3f} {layers:8.2f}  {first:.1f}",
            flush=True,
        )


class Clock(LogitsProcessor):
    """Notes when each token's logits came."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(time.perf_counter())
        return scores


def per_token(model: Any, ids: torch.Tensor, new: int, **options: Any) -> float:
    """Milliseconds a token, the median over `new` tokens after the first two."""
    clock = Clock()
    generate(model, ids, new + 3, logits_processor=LogitsProcessorList([clock]), **options)
    return statistics.median(b - a for a, b in itertools.pairwise(clock.seen[2:])) * 1e3


def replayed(step: Any, count: int = 50) -> float:
    """Milliseconds of one replay, by events around many."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(5):
        step.replay()
    begin.record()
    for _ in range(count):
        step.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / count


def prefill() -> None:
    model = build()
    for length in (128, 1024, 4096):
        for off in (False, True):
            ids, spent = prompt(1, length), []
            for _ in range(6):  # captured at the second
                torch.cuda.synchronize()
                began = time.perf_counter()
                generate(model, ids, 1, disable_compile=off)
                torch.cuda.synchronize()
                spent.append((time.perf_counter() - began) * 1e3)
            calls = " ".join(f"{x:.1f}" for x in spent)
            print(f"prefill of {length} tokens, batch 1, disable_compile={off}: {calls} ms")
        graph = decoding.captured_steps[model][1].prompts.get(length)
        if graph is not None and graph.replay is not None:
            print(f"  its graph alone: {replayed(graph, 10):.2f} ms")


def profile() -> None:
    model = build()
    for batch in (1, 32):
        generate(model, prompt(batch, 64), 3)
        step = decoding.captured_steps[model][batch]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
            for _ in range(5):
                step.replay()
            torch.cuda.synchronize()
        total: Counter[str] = Counter()
        for event in found.key_averages():
            total[event.key[:60]] += event.device_time_total / 5e3
        print(f"one replay at batch {batch}, ms by kernel:")
        for name, ms in total.most_common(8):
            print(f"  {ms:8.4f}  {name}")


def llama() -> None:
    """The peer: transformers' own way to a captured step."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=65536,
        pad_token_id=0, **SIZES,
    )  # fmt: skip
    with torch.device("cuda"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for batch in (1, 32):
        ids, found = prompt(batch, 1024), []
        began = time.perf_counter()
        for _ in range(3):  # the first two compile
            found.append(per_token(model, ids, 130, cache_implementation="static"))
            if len(found) == 1:
                first = time.perf_counter() - began
        print(f"Llama, static cache and compile, batch {batch}: {found[-1]:.3f} ms a token, "
              f"first call {first:.0f} s", flush=True)  # fmt: skip


PARTS = {
    "first": first,
    "check": check,
    "time": times,
    "prefill": prefill,
    "profile": profile,
    "llama": llama,
}

if __name__ == "__main__":
    main()
