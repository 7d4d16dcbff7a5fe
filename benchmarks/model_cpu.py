"""The tiny model on a CPU: OSDN's training step over DeltaNet's, decoding by context and backend.

python benchmarks/model_cpu.py [--rounds 15]

Whatever is compared is timed in turns, so that a busy machine slows both; ratios are medians over
the rounds of the ratio within a round, with quartiles.
"""

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from osdn import OSDNForCausalLM
from osdn.data import Batch, collate, load_tokenizer
from osdn.train import load_recipe
from osdn.train.optim import make_optimizer
from osdn.train.setup import make_model, make_rows

RECIPE = Path(__file__).parent.parent / "recipes" / "tiny.yaml"
DECODED = 64  # tokens a timing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {rounds} rounds"
    )
    steps = {mixer: training_step(mixer) for mixer in ("osdn", "delta_net")}
    report("training step, OSDN / DeltaNet", *(steps[m] for m in steps), rounds, "ms", 1e3)
    model = build("osdn")[0].eval()
    short, long = (decoding(model, context) for context in (16, 4096))
    unit = 1e3 / DECODED
    report("decoding a token, 4,096 / 16 before it", long, short, rounds, "ms", unit)
    plain = build("osdn")[0].eval()
    for layer in plain.model.layers:
        layer.attn.backend = "reference"
    report("decoding, reference / numba", decoding(plain, 16), short, rounds, "ms", unit)


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


if __name__ == "__main__":
    main()
