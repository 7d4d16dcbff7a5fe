"""What the training loop costs over a step written out by hand: same model, rows and numbers.

    python benchmarks/train_step.py [steps]

One process, recipes/tiny.yaml, whose box, seed and rows both take. The two steps take turns in one
process, so that whatever else the machine does falls on both; the losses must be the same bits.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, quantiles

import torch
from torch.nn.utils import clip_grad_norm_

from osdn.data import Row, collate, load_tokenizer
from osdn.train import load_recipe
from osdn.train.distributed.parallel import Parallel
from osdn.train.optim import fill_state, learning_rate, make_optimizer
from osdn.train.setup import make_config, make_model, make_rows, make_sharded
from osdn.train.step import Stepper

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
WARM = 10  # steps that are not counted


def main(steps: int) -> None:
    recipe = load_recipe(RECIPE)
    options, tokenizer = recipe.train, load_tokenizer("byte")
    rows, *_ = make_rows(recipe, tokenizer)
    parallel = Parallel(recipe, torch.device("cpu"))
    sharded = make_sharded(recipe, make_config(recipe, tokenizer), parallel)
    optimizer = make_optimizer(sharded.model, options.optimizer)
    fill_state(optimizer, 0)
    stepper = Stepper(
        sharded, optimizer, parallel, options, passes=1, beat=lambda step, stage: None
    )
    model = make_model(recipe, tokenizer).train()
    plain_optimizer = make_optimizer(model, options.optimizer)

    def loop(step: int, given: Iterator[Row]) -> float:
        return stepper(step, given, measure=False).outcome().loss

    def plain(step: int, given: Iterator[Row]) -> float:
        batch = collate(list(given))
        targets = torch.tensor(batch.targets)
        out = model(
            batch.input_ids, labels=batch.labels, cu_seqlens=batch.cu_seqlens,
            num_items_in_batch=targets,
        )  # fmt: skip
        out.loss.backward()
        norm = clip_grad_norm_(model.parameters(), options.optimizer.clip or float("inf"))
        loss, _ = out.loss.item(), norm.item()
        lr = learning_rate(
            step, steps=options.steps, peak=options.optimizer.lr, schedule=options.schedule
        )
        for group in plain_optimizer.param_groups:
            group["lr"] = lr
        plain_optimizer.step()
        plain_optimizer.zero_grad()
        return loss

    times: dict[str, list[float]] = {"plain": [], "loop": []}
    turns: list[tuple[str, Callable[[int, Iterator[Row]], float]]]
    turns = [("plain", plain), ("loop", loop)]
    for step in range(1, steps + 1):
        given = [next(rows) for _ in range(options.rows)]
        losses = []
        for name, make in turns if step % 2 else turns[::-1]:
            began = time.perf_counter()
            losses.append(make(step, iter(given)))
            times[name].append(time.perf_counter() - began)
        assert losses[0] == losses[1], losses
    ratios = [a / b for a, b in zip(times["plain"][WARM:], times["loop"][WARM:])]
    low, middle, high = quantiles(ratios, n=4)
    print(
        f"plain over loop, {len(ratios)} steps: median {middle:.3f}, quartiles {low:.3f} "
        f"{high:.3f}; a step {1e3 * median(times['loop']):.1f} ms; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("steps", type=int, nargs="?", default=120, help="of each loop (120)")
    main(parser.parse_args().steps)
