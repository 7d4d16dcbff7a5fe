"""When a run's checkpoints are saved, and what the user hears of it."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from osdn.system.locks import DirectoryLock
from osdn.train.checkpoint.writing import Saver, remove_old
from osdn.train.distributed.parallel import Parallel
from osdn.train.log.run_log import RunLog


class Keeper:
    """The checkpoints of one run; a disk that refuses one is reported, and training continues.

    Args:
        root: the directory of all checkpoints.
        keep: how many of the newest are kept.
        saved: step of the checkpoint that the run resumed from, or 0.
        lock: of the run's directory.
        tell: shows a line to the user.
    """

    def __init__(
        self,
        root: Path,
        parallel: Parallel,
        *,
        keep: int,
        saved: int,
        lock: DirectoryLock,
        tell: Callable[[str], None],
    ) -> None:
        self.parallel, self.lock, self.tell = parallel, lock, tell
        self.saved = self.tried = saved  # steps of the newest checkpoint, and of the last attempt
        self.root, self.keep = root, keep
        self._saver = Saver(root, parallel, keep=keep, lost=lambda: lock.lost)

    def start(
        self,
        tensors: dict[str, Tensor],
        counters: dict[str, Any],
        rows: Any,
        recipe: dict[str, Any],
        log: RunLog | None,
    ) -> None:
        """Begin to save; `finish` waits for it.

        Args:
            tensors: named, shared with the model and the optimizer.
            counters: the run's, step included; equal in all processes.
            rows: where this process's rows are.
            log: of the process that writes it.

        Raises:
            UserError: the run's directory is no longer there, or no longer this run's.
        """
        # One save at a time: two would need two copies of everything on the host.
        self.finish()
        self.parallel.from_main(self.lock.check)
        step = self.tried = counters["step"]
        # The log goes first: no checkpoint may be ahead of it.
        problem, logged = None, 0
        if log is not None:
            logged = log.logged
            try:
                log.sync()
            except OSError as error:
                problem = error.strerror
        # Rows of every process go into one file; rank 0's problem is everyone's.
        gathered = self.parallel.gather((rows, problem, logged))
        _, problem, logged = gathered[0]
        # No space for a line is no space for a checkpoint.
        if problem:
            self._not_saved(step, problem)
            return
        state = {**counters, "logged": logged, "data": [one for one, _, _ in gathered]}
        self._saver.start(tensors, state, recipe)

    @property
    def done(self) -> bool:
        """Whether a save was started and `finish` need not wait for it."""
        return self._saver.done

    def finish(self) -> None:
        """Wait for the save that is under way, if one is."""
        try:
            # A refusal is no end of the run: the disk may have room by the next checkpoint.
            self.saved = self._saver.finish() or self.saved
        except OSError as error:
            self._not_saved(self._saver.step, error.strerror or str(error))

    def finish_last(self) -> None:
        """At the run's end: wait for the last save, and delete what is not kept."""
        self.finish()
        # A directory that was replaced meanwhile is another run's.
        self.parallel.from_main(self.lock.check)
        # A run that was killed after its last save, before the older checkpoints went, saves none.
        if self.parallel.main:
            remove_old(self.root, self.keep)

    def _not_saved(self, step: int, problem: str) -> None:
        last = f"step_{self.saved} is intact" if self.saved else "there is none yet"
        self.tell(
            f"WARNING: no checkpoint at step {step}: {problem}; training continues, "
            f"and of the earlier checkpoints {last}; make room"
        )

    def close(self) -> None:
        """Wait for the writer, whatever comes of it, and let go of the host's copy."""
        # On the way out, maybe after an error of which this is a consequence.
        with suppress(OSError, RuntimeError, CheckpointException):
            self._saver.finish()
        self._saver.close()
