"""A training step of the 374 M model on one GPU: speed, memory, and where both go.

    python benchmarks/model_gpu.py [--parts step,memory,profile] [--models osdn,llama] [--full]

step     tokens a second and peak memory of forward, loss and backward; with --full of the whole
         step as `osdn train` makes it: float32 weights under autocast, clipping, AdamW. Medians of
         ten by device events, with the host's own time, and the synchronizations in a step.
memory   what the first block keeps for the backward, tensor by tensor.
profile  milliseconds a step by kind of kernel, and the longest kernels.

Weights are in bfloat16 unless --full, blocks run through torch.compile. Llama is transformers', of
the same sizes, its blocks compiled too, with our loss. `osdn bench --parts model` has FLA's model.
"""

import argparse
import gc
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity
from transformers import AutoModelForCausalLM, LlamaConfig

from osdn import OSDNConfig, OSDNForCausalLM
from osdn.model.loss import linear_cross_entropy, next_token_labels
from osdn.train.blocks import prepare_blocks

SIZES = {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 2816,
         "vocab_size": 32000}  # fmt: skip
STEPS = 10
# The first pattern that a kernel's name matches is its kind.
KINDS = (
    ("convolution", r"^convolution"),
    ("attention", r"flash|fmha|attention"),
    ("products", r"gemm|cutlass|nvjet|xmma|cublas|splitk"),
    ("compiled elementwise", r"^triton_"),
    ("optimiser", r"adam|multi_tensor|lpnorm"),
    ("copies", r"memcpy|memset|copy|fill|cat"),
    ("eager elementwise", r"at::native"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="step,memory,profile")
    parser.add_argument("--models", default="osdn,llama")
    parser.add_argument("--B", type=int, default=8)
    parser.add_argument("--T", type=int, default=4096)
    parser.add_argument("--checkpointing", default="none", help="as train.activation_checkpointing")
    parser.add_argument("--full", action="store_true", help="with autocast and the optimiser")
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, B{args.B} T{args.T}")
    for name in args.models.split(","):
        model = BUILD[name](torch.float32 if args.full else torch.bfloat16, args.checkpointing)
        ids = torch.randint(SIZES["vocab_size"], (args.B, args.T), device="cuda")
        run = step_of(model, ids, full=args.full)
        for part in args.parts.split(","):
            PARTS[part](name, model, ids, run)
        del model, run
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


def build_osdn(dtype: torch.dtype, checkpointing: Any) -> Any:
    torch.manual_seed(0)
    with torch.device("cuda"):
        model: Any = OSDNForCausalLM(OSDNConfig(num_heads=8, **SIZES)).to(dtype).train()
    prepare_blocks(model, checkpointing=checkpointing, compile=True)
    return model


def build_llama(dtype: torch.dtype, checkpointing: str) -> Any:
    """All activations are kept, whatever is asked for."""
    torch.manual_seed(0)
    config = LlamaConfig(num_attention_heads=8, num_key_value_heads=8, use_cache=False,
                         tie_word_embeddings=False, **SIZES)  # fmt: skip
    with torch.device("cuda"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    for block in model.model.layers:
        block.forward = torch.compile(block.forward)
    return model


def step_of(model: Any, ids: Tensor, *, full: bool) -> Callable[[], Tensor]:
    """One step, which waits for nothing; gives the loss."""
    labels = next_token_labels(ids, None).flatten()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) if full else None

    def run() -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=full):
            hidden = model.model(ids, use_cache=False).last_hidden_state.flatten(0, 1)
            loss = linear_cross_entropy(hidden, model.lm_head.weight, labels, labels.numel())
        loss.backward()
        if adamw is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adamw.step()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    return run


def step(name: str, model: Any, ids: Tensor, run: Callable[[], Tensor]) -> None:
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    first = time.perf_counter() - began
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, device, host = torch.cuda.memory_allocated(), [], []
    for _ in range(STEPS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        began = time.perf_counter()
        loss = run()
        host.append((time.perf_counter() - began) * 1e3)
        end.record()
        torch.cuda.synchronize()
        device.append(begin.elapsed_time(end))
    peak, ms = torch.cuda.max_memory_allocated(), median(device)
    spread = (sorted(device)[7] - sorted(device)[2]) / ms
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{name}, {parameters / 1e6:.0f} M: {ms:.1f} ms (spread {spread:.3f}), "
        f"{ids.numel() / ms * 1e3:,.0f} tokens/s, host {median(host):.1f} ms; peak "
        f"{peak / 1e9:.1f} GB, {(peak - before) / 1e9:.1f} beside what was there; "
        f"loss {loss.item():.3f}, first step {first:.0f} s",
        flush=True,
    )
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        run()
        torch.cuda.set_sync_debug_mode("default")
    waits = [x for x in found if "called a synchronizing" in str(x.message)]
    places = Counter(f"{x.filename}:{x.lineno}" for x in waits)
    print(f"{name}: synchronizations in a step: {dict(places) or 'none'}", flush=True)


def memory(name: str, model: Any, ids: Tensor, run: Callable[[], Tensor]) -> None:
    """By saved_tensors_hooks around the first block; parameters are left out."""
    kept: list[tuple[int, str]] = []
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: set[int] = set()
    block = model.model.layers[0]

    def keep(x: Tensor) -> Tensor:
        at = x.untyped_storage().data_ptr() if x.is_cuda else 0
        if x.is_cuda and at not in weights | seen:
            seen.add(at)
            size = x.untyped_storage().nbytes()
            kept.append((size, f"{tuple(x.shape)} {str(x.dtype)[6:]}"))
        return x

    forward = block.forward

    def watched(*args: Any, **options: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            return forward(*args, **options)

    block.forward = watched
    run()
    block.forward = forward
    total = sum(size for size, _ in kept)
    row = 2 * ids.numel() * SIZES["hidden_size"]
    print(f"{name}: a block keeps {total / 1e6:.0f} MB, {total / row:.2f} vectors of D in bfloat16")
    for size, what in sorted(kept, reverse=True):
        if size >= row / 100:
            print(f"  {size / 1e6:8.1f} MB {size / row:6.2f}  {what}")


def profile(name: str, model: Any, ids: Tensor, run: Callable[[], Tensor]) -> None:
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(2):
            run()
        torch.cuda.synchronize()
    kinds: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    for event in found.key_averages():
        ms = event.device_time_total / 2e3
        kind = next((k for k, p in KINDS if re.search(p, event.key, re.I)), "operator")
        kinds[kind] += ms
        kernels[f"{kind}: {event.key[:70]} × {event.count // 2}"] += ms
    print(f"{name}: {sum(kinds.values()):.1f} ms of kernels a step: "
          + ", ".join(f"{kind} {ms:.1f}" for kind, ms in kinds.most_common()))  # fmt: skip
    for kernel, ms in kernels.most_common(32):
        print(f"  {ms:8.2f}  {kernel}")


BUILD = {"osdn": build_osdn, "llama": build_llama}
PARTS = {"step": step, "memory": memory, "profile": profile}

if __name__ == "__main__":
    main()
