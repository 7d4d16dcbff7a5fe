"""`osdn demo`: OSDN beside its DeltaNet twin, in minutes, from nothing.

First in-context recall (MQAR) with a memory that is small for what it must hold. Then two language
models, trained on the same text in the same order from the same initial weights: a table, both
loss curves and the preconditioner that OSDN learned, and a passage that OSDN writes.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from osdn.cli.generate import load
from osdn.data import collate
from osdn.errors import UserError
from osdn.evals.mqar.demo import small_comparison
from osdn.evals.results import markdown
from osdn.train import Recipe, TrainResult, load_recipe, train
from osdn.train.setup import make_rows

NAMES = {"osdn": "OSDN", "delta_net": "DeltaNet"}
PROMPT = "def "
PASSAGE_TOKENS = 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="change the recipe, such as train.steps=9",
    )
    parser.add_argument("--recipe", type=Path, default=Path("recipes/tiny.yaml"))
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where all of it goes")


def run(args: argparse.Namespace) -> None:
    recipes = {
        mixer: load_recipe(args.recipe, [*args.overrides, f"model.mixer={mixer}"])
        for mixer in NAMES
    }
    print("Recall: 16 key-value pairs in a memory of 16 × 16, two seeds, two learning rates")
    comparison, recall_plot = small_comparison(args.out / "recall")
    print(markdown(comparison["tables"][0]))
    results = {}
    for mixer, name in NAMES.items():
        print(f"\nTraining the {name} language model", flush=True)
        results[mixer] = train(recipes[mixer], args.out / mixer)
    print("\n" + table(results))

    model, tokenizer = load(args.out / "osdn" / "model")
    preconds = final_preconds(model, held_out_ids(recipes["osdn"], tokenizer))
    path = args.out / "demo.png"
    draw(results, preconds, path)
    print(f"\nOSDN goes on from {PROMPT!r} (temperature 0.7):\n")
    torch.manual_seed(recipes["osdn"].train.seed)
    model.generate(
        tokenizer(PROMPT, return_tensors="pt").input_ids.long(),
        max_new_tokens=PASSAGE_TOKENS,
        do_sample=True,
        temperature=0.7,
        top_k=0,  # from all tokens: transformers' default is the 50 likeliest
        pad_token_id=tokenizer.pad_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
    )
    print(f"\nPlots: {recall_plot} (recall)")
    print(f"       {path} (loss curves and the learned preconditioner)")


def table(results: dict[str, TrainResult]) -> str:
    """One line a model, in Markdown."""
    lines = [
        "| model | parameters | validation bits per byte | tokens/s | non-finite steps |",
        "|---|---:|---:|---:|---:|",
    ]
    for mixer, r in results.items():
        bits = "–" if r.bits_per_byte is None else f"{r.bits_per_byte:.4f}"
        share = 100 * r.nonfinite / r.steps
        lines.append(
            f"| {NAMES[mixer]} | {r.parameters:,} | {bits} | {r.tokens_per_s:,.0f} | {share:.1f}% |"
        )
    return "\n".join(lines)


def held_out_ids(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The first row of the validation text, [1, seq_len]."""
    _, rows, _, _ = make_rows(recipe, tokenizer)
    if not rows:
        raise UserError("data.validation: the demo needs held-out text, so give it a share")
    return collate(rows[:1]).input_ids


@torch.no_grad()
def final_preconds(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """d after the last token of ids [1, T], one [H, K] per layer."""
    cache = model(ids, use_cache=True).past_key_values
    return [layer.recurrent_states[1][0] for layer in cache.layers]


def draw(results: dict[str, TrainResult], preconds: list[Tensor], path: Path) -> None:
    """Both loss curves on the left; on the right d by layer and feature, heads side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(12, 5), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.25), height_ratios=(2.2, 1))
    left, below = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
    right = figure.add_subplot(grid[:, 1])
    smooth = {}
    for (mixer, result), color, style in zip(results.items(), ("#D55E00", "#0072B2"), ("-", "--")):
        steps = [step for step, loss in result.loss if loss is not None]
        losses = torch.tensor([loss for _, loss in result.loss if loss is not None])
        window = max(1, len(losses) // 20)
        smooth[mixer] = dict(zip(steps[window - 1 :], losses.unfold(0, window, 1).mean(-1)))
        left.plot(steps, losses, color=color, alpha=0.2, linewidth=0.8)
        x, y = list(smooth[mixer]), list(smooth[mixer].values())
        left.plot(x, y, style, color=color, label=NAMES[mixer])
    left.set(ylabel="training loss, nats per byte", title="Same data, same seed")
    left.legend()
    both = [step for step in smooth["osdn"] if step in smooth["delta_net"]]
    below.axhline(0, color="black", linewidth=0.8)
    below.plot(
        both, [smooth["osdn"][step] - smooth["delta_net"][step] for step in both], color="#D55E00"
    )
    below.set(xlabel="optimiser step (mean over a window)", ylabel="OSDN − DeltaNet")
    d = torch.stack([x.flatten() for x in preconds])
    reach = max(0.1, (d - 1).abs().max().item())
    image = right.imshow(d.numpy(), aspect="auto", cmap="PuOr", vmin=1 - reach, vmax=1 + reach)
    heads, features = preconds[0].shape
    for head in range(1, heads):
        right.axvline(head * features - 0.5, color="black", linewidth=0.8)
    right.set(
        xlabel=f"key feature ({heads} heads of {features}, side by side)",
        ylabel="layer",
        title="OSDN's preconditioner d after a held-out text (DeltaNet: 1)",
        yticks=range(len(preconds)),
    )
    figure.colorbar(image, ax=right, label="step size of the feature")
    figure.savefig(path, dpi=130)
    plt.close(figure)
