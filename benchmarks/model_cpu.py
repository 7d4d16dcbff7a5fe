"""Models on a CPU: OSDN's training step over DeltaNet's, decoding by context and backend, generate.

    python benchmarks/model_cpu.py [--rounds 15]
    OMP_NUM_THREADS=2 python benchmarks/model_cpu.py --parts generate

steps     the tiny recipe's model: a training step, and decoding by forward.
generate  tokens a second by `generate` with 10 M parameters, beside transformers' Llama of the same
          sizes, greedy, one sequence and eight.

Whatever is compared is timed in turns, so that a busy machine slows both; ratios are medians over
the rounds of the ratio within a round, with quartiles.
"""

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from osdn import OSDNConfig, OSDNForCausalLM
from osdn.data import Batch, collate, load_tokenizer
from osdn.train import load_recipe
from osdn.train.optim import make_optimizer
from osdn.train.setup import make_model, make_rows

RECIPE = Path(__file__).parent.parent / "recipes" / "tiny.yaml"
DECODED = 64  # tokens a timing
SIZES: dict[str, Any] = {"hidden_size": 256, "num_hidden_layers": 8, "intermediate_size": 768,
                         "vocab_size": 6144}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--parts", default="steps,generate")
    args = parser.parse_args()
    rounds = args.rounds
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {rounds} rounds"
    )
    for part in args.parts.split(","):
        PARTS[part](rounds)


def steps(rounds: int) -> None:
    training = {mixer: training_step(mixer) for mixer in ("osdn", "delta_net")}
    report("training step, OSDN / DeltaNet", *training.values(), rounds, "ms", 1e3)
    model = build("osdn")[0].eval()
    short, long = (decoding(model, context) for context in (16, 4096))
    unit = 1e3 / DECODED
    report("decoding a token, 4,096 / 16 before it", long, short, rounds, "ms", unit)
    plain = build("osdn")[0].eval()
    for layer in plain.model.layers:
        layer.attn.backend = "reference"
    report("decoding, reference / numba", decoding(plain, 16), short, rounds, "ms", unit)


def generate(rounds: int) -> None:
    models = [osdn_10m(), llama_10m()]
    sizes = " and ".join(f"{sum(p.numel() for p in m.parameters()) / 1e6:.1f} M" for m in models)
    print(f"generate, OSDN and Llama of {sizes} parameters, float32")
    for batch in (1, 8):
        ids = torch.randint(1, SIZES["vocab_size"], (batch, 16))
        name = f"ms a token by generate, batch {batch}, OSDN / Llama"
        ours, peer = (generation(model, ids) for model in models)
        report(name, ours, peer, rounds, "ms", 1e3 / DECODED)


def generation(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    """DECODED tokens by `generate`, greedily; Llama's cache grows, which is its fastest here."""
    mask = torch.ones_like(ids)

    def run() -> None:
        model.generate(ids, attention_mask=mask, max_new_tokens=DECODED, min_new_tokens=DECODED,
                       do_sample=False)  # fmt: skip

    return run


def osdn_10m() -> Any:
    torch.manual_seed(0)
    return OSDNForCausalLM(OSDNConfig(num_heads=4, pad_token_id=0, **SIZES)).eval()


def llama_10m() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=4, pad_token_id=0, **SIZES)
    return AutoModelForCausalLM.from_config(config).eval()


def build(mixer: str) -> tuple[OSDNForCausalLM, Batch]:
    """The recipe's model with that mixer, and its first batch."""
    recipe = load_recipe(RECIPE, [f"model.mixer={mixer}"])
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    rows, *_ = make_rows(recipe, tokenizer)
    batch = collate([next(rows) for _ in range(recipe.train.rows)])
    return make_model(recipe, tokenizer), batch


def training_step(mixer: str) -> Callable[[], None]:
    """Forward, backward and optimiser step on one and the same batch."""
    model, batch = build(mixer)
    optimizer = make_optimizer(model.train(), load_recipe(RECIPE).train.optimizer)

    def run() -> None:
        model(batch.input_ids, labels=batch.labels, cu_seqlens=batch.cu_seqlens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def decoding(model: OSDNForCausalLM, context: int) -> Callable[[], None]:
    """DECODED tokens, one at a time, after `context` others."""
    with torch.inference_mode():
        ids = torch.arange(context)[None] % 256
        cache = model(ids, use_cache=True).past_key_values

    @torch.inference_mode()
    def run() -> None:
        for token in range(DECODED):
            model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)

    return run


def report(
    name: str,
    first: Callable[[], None],
    second: Callable[[], None],
    rounds: int,
    unit: str,
    scale: float,
) -> None:
    """Time both in turns and print the ratio first / second."""
    times: list[list[float]] = [[], []]
    for round_ in range(rounds + 2):
        for run, kept in zip((first, second), times):
            began = time.perf_counter()
            run()
            if round_ >= 2:  # the first ones compile and warm up
                kept.append(time.perf_counter() - began)
    a, b = np.array(times) * scale
    low, middle, high = np.quantile(a / b, [0.25, 0.5, 0.75])
    print(
        f"{name}: {middle:.3f} [{low:.3f}, {high:.3f}] "
        f"({np.median(a):.3f} / {np.median(b):.3f} {unit})"
    )


PARTS = {"steps": steps, "generate": generate}

if __name__ == "__main__":
    main()
