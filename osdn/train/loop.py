"""Training: find what there is of the run, go on with it, and read its result."""

from collections.abc import Callable
from pathlib import Path

from osdn.errors import UserError
from osdn.system.locks import DirectoryLock
from osdn.system.signals import Signals
from osdn.train.checkpoint import reading as checkpoint
from osdn.train.distributed.parallel import Parallel
from osdn.train.log.run_log import TrainResult, read_result, tell
from osdn.train.recipe import Recipe
from osdn.train.setup import make_device
from osdn.train.trainer import Trainer

LOCK = ".train.lock"  # within the run's directory, so that it is found wherever that is mounted
BUSY = (
    "another process trains there; wait until it has ended, or give this run a directory of its "
    "own (--out)"
)


def train(
    recipe: Recipe, out: str | Path, *, make_trainer: Callable[..., Trainer] = Trainer
) -> TrainResult:
    """Train as the recipe says, or resume from the newest checkpoint in the directory `out`.

    out/log.jsonl      a line per logged step and per validation
    out/tensorboard/   the same, as events
    out/checkpoints/   step_N/
    out/model/         at the end: what AutoModelForCausalLM and AutoTokenizer load

    A finished run is not trained again; its result is read from the log. A run that another process
    makes there (it holds out/.train.lock) is left alone. Started by torchrun, every
    process calls this, with `out` on a file system that all of them see.

    Args:
        make_trainer: called as Trainer is, for a run that begins otherwise.

    Raises:
        UserError: something the user can put right, in one line.
        KeyboardInterrupt, SystemExit(143): Ctrl-C or SIGTERM came; a checkpoint was saved first.
    """
    # The processes meet first: what follows may fail in one of them, and all must hear of it.
    parallel = Parallel(recipe, make_device(recipe.train.device))
    lock = DirectoryLock(Path(out), LOCK, BUSY)
    try:
        # Before anything is read: another process could save or cut the log meanwhile.
        parallel.from_main(lock.take)
        return _train(recipe, Path(out), parallel, lock, make_trainer)
    finally:
        lock.release()
        parallel.close()


def _train(
    recipe: Recipe,
    out: Path,
    parallel: Parallel,
    lock: DirectoryLock,
    make_trainer: Callable[..., Trainer],
) -> TrainResult:
    found, finished = parallel.from_main(lambda: _find(recipe, out))
    if found is None or found.state.step < recipe.train.steps or not finished:
        # A run that has all steps and no model comes here too: only the export is left.
        # Everything that can fail by a user's mistake fails here, before the first step.
        trainer = make_trainer(recipe, out, found, parallel, lock)
        try:
            # From here on Ctrl-C is a wish, acted on between two steps.
            with Signals() as signals:
                trainer.complete(signals)
        finally:
            trainer.close()
        # The result is read from the log in both cases: a run and its repetition show the same.
        state = trainer.state()
    else:
        if parallel.main:
            tell(f"{out}: this run is finished; its result is shown again")
        state = found.state.model_dump()
    return read_result(
        out,
        parameters=state["parameters"],
        steps=state["step"],
        nonfinite=state["nonfinite"],
    )


def _find(recipe: Recipe, out: Path) -> tuple[checkpoint.Checkpoint | None, bool]:
    """The checkpoint to resume from, and whether the finished model is there."""
    # Compared with this recipe first: one that differs is an error, not a new run.
    found = checkpoint.load_newest(out / "checkpoints", recipe.resolved(), tell)
    finished = out / "model"
    # Fewer steps than were made: the schedule of this recipe ends before them.
    if found is not None and found.state.step > recipe.train.steps:
        raise UserError(
            f"{found.directory}: expected at most train.steps={recipe.train.steps} steps, found "
            f"{found.state.step}; it is no checkpoint of this run: move it away"
        )
    # A model of unknown origin must not be taken for this run's, nor written over.
    if found is None and finished.exists():
        raise UserError(
            f"{finished} is there without a checkpoint to compare this run with; give the new "
            "run a directory of its own (--out), or move the old one away"
        )
    return found, finished.exists()
