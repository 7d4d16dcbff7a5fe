"""Train the grid of an MQAR recipe, keep every finished cell, compare the mixers."""

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from pydantic import Field
from tqdm import tqdm

from osdn.errors import UserError
from osdn.evals.mqar.recipe import Cell, MQARRecipe
from osdn.evals.mqar.task import MQARModel, Outcome, train
from osdn.evals.plots import save
from osdn.evals.results import RESULT, make_result, point, write_json
from osdn.system.outside import Malformed, Outside, parse_plain
from osdn.system.processes import end_with_parent, process_context
from osdn.train.setup import make_device

CELLS = "cells"
PLOT = "mqar.png"
Outcomes = dict[Cell, dict[str, Any]]


def compare(recipe: MQARRecipe, out: Path) -> dict[str, Any]:
    """Train the cells that `out` lacks; write and return the result (see osdn.evals.results).

    Raises:
        UserError: `out` holds a cell of another recipe.
    """
    # Cells are kept one by one: a grid takes hours, and its axes may grow.
    outcomes = _finished(recipe, out / CELLS)
    left = [cell for cell in recipe.cells() if cell not in outcomes]
    with tqdm(total=len(recipe.cells()), initial=len(outcomes), desc="mqar", unit="cell") as bar:
        for cell, outcome in _train_all(recipe, left):
            write_json(out / CELLS / cell.file, outcome)  # at once, whole or not at all
            outcomes[cell] = outcome
            bar.set_postfix_str(
                f"{cell.mixer} lr {cell.learning_rate:g}: {outcome['accuracy']:.3f}"
            )
            bar.update()
    result = summarise(recipe, outcomes)
    write_json(out / RESULT, result)
    save(result["curves"], [], out / PLOT)
    return result


class Described(Outside):
    """A cell's file."""

    cell: dict[str, Any]
    accuracy: float
    by_pair: list[float] = Field(default_factory=list)
    diverged: bool
    state_size: int


def read_outcome(path: Path) -> dict[str, Any]:
    """What a trained cell left.

    Raises:
        UserError: the file is damaged.
    """
    try:
        outcome: dict[str, Any] = parse_plain(path.read_bytes(), Described, str(path))
    except (OSError, Malformed) as error:
        reason = error.reason if isinstance(error, Malformed) else error.strerror
        raise UserError(f"{path}: damaged; delete it to train it again ({reason})") from error
    return outcome


def _finished(recipe: MQARRecipe, directory: Path) -> Outcomes:
    outcomes = {}
    for cell in recipe.cells():
        path = directory / cell.file
        if not path.exists():
            continue
        outcome = read_outcome(path)
        # The whole description: a cell of other options must not be taken for this one.
        if outcome["cell"] != json.loads(json.dumps(recipe.describe(cell))):
            raise UserError(
                f"{path}: trained with another recipe; choose another --out, or delete {directory}"
            )
        outcomes[cell] = outcome
    return outcomes


def _train_all(recipe: MQARRecipe, cells: list[Cell]) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Every cell's outcome as it is finished, in this process or in several."""
    if recipe.train.processes == 1 or len(cells) == 1:
        for cell in cells:
            yield cell, train_cell(recipe, cell)
        return
    # A fork of this process would have its OpenMP and CUDA state, without their threads.
    with ProcessPoolExecutor(
        recipe.train.processes, mp_context=process_context(), initializer=_begin_worker
    ) as pool:
        try:
            pending = {pool.submit(train_cell, recipe, cell): cell for cell in cells}
            for future in as_completed(pending):  # in the order of finishing, each kept as it comes
                yield pending[future], future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps for want of memory; the finished cells are "
                f"kept: give the command again, with fewer than train.processes="
                f"{recipe.train.processes} if memory was short"
            ) from None
        except BaseException:
            # Ctrl-C: what waits is dropped, what runs ends with its process.
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin_worker() -> None:
    # The processes share the cores; more threads would only wait for each other.
    torch.set_num_threads(1)
    end_with_parent()


def train_model(model: MQARModel, recipe: MQARRecipe, cell: Cell) -> Outcome:
    """Train a model as a cell says, whatever its mixer is."""
    options = recipe.train
    return train(
        model,
        recipe.task(cell.setting),
        # The grid's learning rate.
        optimizer=options.optimizer.model_copy(update={"lr": cell.learning_rate}),
        schedule=options.schedule,
        examples=options.examples,
        test_examples=options.test_examples,
        batch_size=cell.setting.batch_size,
        epochs=options.epochs,
        stop_at=options.stop_at,
        seed=cell.seed,
    )


def train_cell(recipe: MQARRecipe, cell: Cell) -> dict[str, Any]:
    """Train one cell; its description, accuracy and more, as plain values."""
    # Of the initial weights; data and order have generators of their own, from the same seed.
    torch.manual_seed(cell.seed)
    model = recipe.build(cell.mixer, cell.width).to(make_device(recipe.train.device))
    outcome = train_model(model, recipe, cell)
    return {
        "cell": recipe.describe(cell),
        "accuracy": outcome.accuracy,
        "by_pair": [round(share, 4) for share in outcome.by_pair],
        "steps": outcome.steps,
        "diverged": outcome.diverged,
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_size": model.state_size(cell.setting.length),
    }


def summarise(recipe: MQARRecipe, outcomes: Outcomes) -> dict[str, Any]:
    """The result: a score per mixer, task and width at its best learning rate, table and curves.

    The best learning rate is the one with the highest mean over the seeds, on the test set itself,
    as in the published sweep. The interval of a score is the lowest and the highest seed.
    """
    rows, scores, curves = [], [], []
    for setting in recipe.tasks:
        for width in recipe.widths:
            group = f"{setting.length} tokens, {setting.pairs} pairs, width {width}"
            series = {}
            for mixer in recipe.mixers:
                points = {  # learning rate -> outcomes by seed
                    lr: [outcomes[Cell(mixer, setting, width, lr, s)] for s in recipe.seeds]
                    for lr in recipe.learning_rates
                }
                # Chosen by the mean over seeds: by the best seed a noisy mixer would win.
                best, row = _row(points)
                rows.append([group, mixer, *row])
                # At that learning rate, a seed each.
                values = [one["accuracy"] for one in points[best]]
                scores.append(_spread(mixer, values) | {"group": group})
                # The curve shows every learning rate, so that a grid that ends too early is seen.
                series[mixer] = [
                    point(lr, _spread("", [one["accuracy"] for one in found]))
                    for lr, found in points.items()
                ]
            axes = {"x": "learning rate", "y": "share of right answers", "log_x": True}
            curves.append({"title": f"MQAR, {group}", **axes, "series": series})
    columns = [
        "task",
        "mixer",
        "state",
        "best lr",
        "mean",
        "± over seeds",
        "grid's best",
        "diverged",
    ]
    table = {"title": "MQAR at each mixer's best learning rate", "columns": columns, "rows": rows}
    # Without what changes no figure, so that two machines' results may be compared.
    protocol = recipe.model_dump(
        mode="json", exclude={"mixers": True, "train": {"device", "processes"}}
    )
    return make_result(
        "mqar",
        protocol=protocol | {"mixers": recipe.mixers},
        model=None,
        samples=len(outcomes),
        scores=scores,
        tables=[table],
        curves=curves,
    )


def _row(points: dict[float, list[dict[str, Any]]]) -> tuple[float, list[Any]]:
    """(best learning rate, [state, best lr, mean, spread, grid's best, diverged cells])."""
    means = {lr: mean(one["accuracy"] for one in found) for lr, found in points.items()}
    best = max(means, key=lambda lr: means[lr])
    values = [one["accuracy"] for one in points[best]]
    cells = [one for found in points.values() for one in found]
    spread = f"{stdev(values):.3f}" if len(values) > 1 else "–"
    # The best single cell, which other papers report.
    grid_best = max(one["accuracy"] for one in cells)
    diverged = sum(one["diverged"] for one in cells)
    state = f"{cells[0]['state_size']:,}"
    return best, [state, f"{best:g}", f"{means[best]:.3f}", spread, f"{grid_best:.3f}", diverged]


def _spread(name: str, values: list[float]) -> dict[str, Any]:
    """A score whose interval is the range over the seeds."""
    ends = {"low": min(values), "high": max(values)}
    return {"group": "", "name": name, "value": mean(values), **ends, "n": len(values)}
