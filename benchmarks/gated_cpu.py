"""transformers' Qwen3.5 on a CPU: prefill with `accelerate` over without, and the rule alone.

python benchmarks/gated_cpu.py [--rounds 7] [--tokens 2048] [--layers 4]

Random models of Qwen3.5's layer sizes: hidden 1,024, 16 key heads and 16 or 32 value heads of 128,
every fourth layer attention. What is compared is timed in turns; ratios are medians over the rounds
of the ratio within a round, with quartiles. Without flash-linear-attention in the way: transformers
runs its own PyTorch functions.
"""

import argparse
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.models.qwen3_5 import modeling_qwen3_5

from osdn.integrations.transformers import accelerate
from osdn.integrations.transformers.functions import SIGNATURES, known_modules, rule

KEY_HEADS, SIZE, HIDDEN = 16, 128, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    given = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, {given.tokens} tokens, "
        f"{given.layers} layers, {given.rounds} rounds"
    )
    for module in known_modules():  # what transformers runs where FLA is not installed
        for name in SIGNATURES:
            function = getattr(module, name)
            setattr(module, name, getattr(function, "__wrapped__", function))
    with torch.inference_mode():
        for heads in (32, 16):
            where = f"{KEY_HEADS} key and {heads} value heads"
            report(f"prefill, {where}", *prefill(heads, given.tokens, given.layers), given.rounds)
            report(f"the rule alone, {where}", *rules(heads, given.tokens), given.rounds)


def prefill(heads: int, tokens: int, layers: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A whole model's forward over a prompt into a cache, with `accelerate` and without."""
    config = Qwen3_5TextConfig(
        vocab_size=32000, hidden_size=HIDDEN, intermediate_size=3584, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=2, head_dim=256,
        linear_num_key_heads=KEY_HEADS, linear_num_value_heads=heads,
        linear_key_head_dim=SIZE, linear_value_head_dim=SIZE,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3_5ForCausalLM(config).eval()
    ids = torch.randint(config.vocab_size, (1, tokens))

    def without() -> Any:
        return model(ids, use_cache=True, logits_to_keep=1)

    def with_ours() -> Any:
        with accelerate():
            return without()

    return with_ours, without


def rules(heads: int, tokens: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The gated delta rule over one sequence: ours, and transformers' over chunks."""
    torch.manual_seed(0)
    q, k = (torch.randn(1, tokens, KEY_HEADS, SIZE) for _ in range(2))
    v = torch.randn(1, tokens, heads, SIZE)
    gates = {
        "g": torch.nn.functional.logsigmoid(torch.randn(1, tokens, heads) + 2),
        "beta": torch.rand(1, tokens, heads),
    }
    options: dict[str, Any] = {
        **gates, "output_final_state": True, "use_qk_l2norm_in_kernel": True,
    }  # fmt: skip
    theirs = modeling_qwen3_5.torch_chunk_gated_delta_rule
    return lambda: rule(q, k, v, **options), lambda: theirs(q, k, v, **options)


def report(
    name: str, ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int, warm: int = 1
) -> None:
    """Time both in turns and print the ratio ours / theirs."""
    times: list[list[float]] = [[], []]
    for turn in range(warm + rounds):
        for run, kept in zip((ours, theirs), times):
            began = time.perf_counter()
            run()
            if turn >= warm:  # the first one compiles
                kept.append(time.perf_counter() - began)
    a, b = np.array(times)
    low, middle, high = np.quantile(a / b, [0.25, 0.5, 0.75])
    print(
        f"{name}: {middle:.3f} [{low:.3f}, {high:.3f}] ({np.median(a):.3f} / {np.median(b):.3f} s)",
        flush=True,
    )


if __name__ == "__main__":
    main()
