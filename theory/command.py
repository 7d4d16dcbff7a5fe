"""run the theory's experiments and draw their plots"""

import argparse
import platform
import time
from pathlib import Path

import torch
from tqdm import tqdm

from osdn.errors import UserError
from theory.experiments import (
    BOXES,
    CAP,
    DRIFT_ETAS,
    ETAS,
    FEATURES,
    GAMMAS,
    GRADIENT,
    KAPPAS,
    LEARNED,
    NEWTON,
    ROUND,
    SCENES,
    Drift,
    FullBatch,
    TokenLocal,
    drift,
    full_batch,
    token_local,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--out only: the experiments have no knobs, so that two reports can be compared."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/theory"),
        metavar="DIR",
        help="where report.md and three PNG files go (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """The three experiments, a progress bar, then the report on the terminal and in DIR."""
    from theory import plots

    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot make the directory {args.out}: {error.strerror}") from None
    began = time.perf_counter()
    # The matrices are 16 × 16: more threads only wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rounds = len(FEATURES) * len(LEARNED) * CAP // ROUND
    with tqdm(total=rounds, desc="full batch", leave=False) as bar:
        batch = full_batch(bar.update)
    with tqdm(total=len(ETAS), desc="token-local", leave=False) as bar:
        local = token_local(bar.update)
    with tqdm(total=1 + 2 * len(BOXES) * len(DRIFT_ETAS), desc="drift", leave=False) as bar:
        drifted = drift(bar.update)
    torch.set_num_threads(threads)
    plots.draw_full_batch(batch, args.out / "full_batch.png")
    plots.draw_token_local(local, args.out / "token_local.png")
    plots.draw_drift(drifted, args.out / "drift.png")
    seconds = time.perf_counter() - began
    report = "\n\n".join((_full_batch_text(batch), _token_local_text(local), _drift_text(drifted)))
    report += (
        f"\n\nMade by `python -m theory` in {seconds:.0f} s: float64, torch {torch.__version__}, "
        f"one thread, {platform.machine()}, seeds fixed.\n"
    )
    (args.out / "report.md").write_text(report)
    print(report)
    print(f"Plots and this report: {args.out}")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with columns of even width."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
        for line in lines
    )


def _full_batch_text(result: FullBatch) -> str:
    head = ["features", "method", *(f"κ = {kappa:.0e}" for kappa in KAPPAS)]
    rows = []
    for features in FEATURES:
        for method in (GRADIENT, *LEARNED, NEWTON):
            counts = (result.steps[features, method, kappa] for kappa in KAPPAS)
            cells = [f"> {CAP:,}" if count is None else f"{count:,}" for count in counts]
            rows.append([features, method, *cells])
        values = (result.residual[features, kappa] for kappa in KAPPAS)
        rows.append([features, "residual of Statement 10", *(f"{value:.2g}" for value in values)])
    return (
        "## Full batch: iterations to a gap of 1e-12\n\n"
        "16 features, d₁ = 1/L, η = 1, median of 3 runs; gradient descent is counted in the "
        "eigenbasis.\n\n" + table(head, rows)
    )


def _token_local_text(result: TokenLocal) -> str:
    head = ["d₁", "η", "log₁₀ Π x²", "its bound", "Σ x² / its bound"]
    rows = [
        [name, f"{eta:g}", f"{measured:.1f}", f"{bound:.1f}", f"{share:.3f}"]
        for name, eta, measured, bound, share in result.rows
    ]
    return (
        "## Token-local: the product of residual ratios at β = 1 against its bound\n\n"
        "512 unit keys of 16 features, b = 1, γ = 1, no box.\n\n" + table(head, rows)
    )


def _drift_text(result: Drift) -> str:
    head = ["scene", "b", "η", "box"]
    head += [f"error, γ = {gamma:g}" for gamma in GAMMAS]
    head += ["mean x², γ = 1", "mean x², γ = 0.99", "d from, to", "growth"]
    rows = []
    for scene, name in enumerate(SCENES):
        for (eta, box, beta_aware), error in result.error.items():
            low, high = result.extremes[eta, box, beta_aware]
            x2 = result.x2[eta, box, beta_aware][scene]
            rows.append(
                [name, "β" if beta_aware else "1", f"{eta:g}"]
                + ["none" if box is None else f"[{box[0]:g}, {box[1]:g}]"]
                + [f"{value:.3f}" for value in error[scene].tolist()]
                + [f"{x2[0]:.3f}", f"{x2[2]:.3f}"]
                + [f"{low[scene].min():.2f}, {high[scene].max():.2f}"]
                + [f"{result.growth[eta, box, beta_aware][scene].max():.3f}"]
            )
    return (
        "## Drift: mean squared prediction error over the plain delta rule's (1 = no change)\n\n"
        "A stream of 1,024 tokens whose statistics change every 128, 16 features, d₁ = 1, 8 seeds; "
        "the last two columns are the extremes over all γ.\n\n" + table(head, rows)
    )
