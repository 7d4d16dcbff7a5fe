"""Processes that take runs one after another, and the loop that keeps them busy to a deadline.

On a machine with several GPUs the processes are dealt to them; each sees its own alone.
"""

import os
import time
import traceback
from collections.abc import Callable, Generator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from osdn.errors import UserError
from osdn.system.processes import end_with_parent, process_context
from study.plan import Run

Finished = tuple[Run, dict[str, Any] | None, str, float]

GRACE = 60.0  # seconds that a training has to save a checkpoint


def perform(kind: str, spec: dict[str, Any], device: str, work: Path) -> dict[str, Any]:
    """One run's outcome; "steps" among it."""
    if kind == "mqar":
        from osdn.evals.mqar.grid import train_cell
        from study.plan import single

        outcome = train_cell(*single(spec, device))
        del outcome["cell"]
        return outcome
    from study.language import perform as language

    return language(spec, device=device, work=work)


def _serve(
    connection: Connection, device: str, work: Path, threads: int, visible: str | None
) -> None:
    """A worker: (kind, spec) in, (outcome or None, error) out, until the other side is gone."""
    end_with_parent()
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible  # read when this process first uses CUDA
    torch.set_num_threads(threads)
    connection.send("ready")
    while True:
        try:
            kind, spec = connection.recv()
        except EOFError:
            return
        reply: tuple[dict[str, Any] | None, str]
        try:
            reply = perform(kind, spec, device, work), ""
        except UserError as error:
            reply = None, str(error)
        except Exception:
            reply = None, traceback.format_exc()
        try:
            connection.send(reply)
        except BrokenPipeError:
            return


def visible_gpus() -> list[str]:
    """The CUDA devices of this process, as CUDA_VISIBLE_DEVICES names each of them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else map(str, range(torch.cuda.device_count()))
    return list(names)[: torch.cuda.device_count()]


class Worker:
    """A process of its own, without CUDA's state, that performs one run at a time.

    Args:
        visible: the one CUDA device that it sees, as CUDA_VISIBLE_DEVICES names it; None: all.
    """

    def __init__(self, device: str, work: Path, threads: int, visible: str | None = None) -> None:
        # Not spawned: importing torch and transformers takes seconds in every new interpreter.
        context = process_context()
        self.connection, other = context.Pipe()
        self.visible = visible
        arguments = (other, device, work, threads, visible)
        self.process = context.Process(target=_serve, args=arguments)
        self.process.start()
        other.close()
        self.ready = False
        self.run: Run | None = None
        self.began = 0.0

    def give(self, run: Run) -> None:
        """Start a run."""
        self.run, self.began = run, time.monotonic()
        self.connection.send((run.kind, run.spec))

    def hear(self) -> Finished | None:
        """What the process has to say, waiting for it: that it is ready (None), or a run's end; its
        death is one, too.
        """
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.stop()
            if self.run is None:
                raise RuntimeError("a worker process died as it started") from None
            message = None, f"its process died ({self.process.exitcode})"
        if not self.ready:
            self.ready = True
            return None
        run, self.run = self.run, None
        assert run is not None
        return run, *message, time.monotonic() - self.began

    def leave(self) -> None:
        """Ask the process to end: idle, it returns; a language model's training saves first."""
        self.connection.close()
        if self.run is not None or not self.ready:
            self.process.terminate()

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.leave()
        self.process.join(GRACE)
        self.process.kill()
        self.process.join()


def complete(
    runs: list[Run],
    *,
    processes: int,
    device: str,
    work: Path,
    left: Callable[[], float],
    seconds: Callable[[Run], float],
) -> Generator[Finished]:
    """(run, outcome or None, error, seconds) of runs as they finish, several at a time.

    A run is begun only if its predicted time still fits; at the deadline what is under way is
    ended, and all that is left of it is a language model's checkpoint. A process that dies costs
    its run, and is replaced.

    Args:
        left: seconds until the deadline, inf without one.
        seconds: how long a run is expected to take.
    """
    waiting = list(runs)
    threads = max(1, torch.get_num_threads() // processes)
    gpus = visible_gpus() if device == "cuda" else []
    workers = [
        Worker(device, work, threads, gpus[i % len(gpus)] if gpus else None)
        for i in range(min(processes, len(waiting)))
    ]
    try:
        while workers:
            for worker in [w for w in workers if w.ready and w.run is None]:
                run = next((one for one in waiting if seconds(one) <= left()), None)
                if run is None:
                    worker.stop()
                    workers.remove(worker)
                else:
                    waiting.remove(run)
                    worker.give(run)
            if left() <= 0:
                return
            heard = wait([worker.connection for worker in workers], min(max(left(), 0), 1.0))
            for i, worker in enumerate(workers):
                if worker.connection not in heard:
                    continue
                if finished := worker.hear():
                    yield finished
                if worker.connection.closed:
                    workers[i] = Worker(device, work, threads, worker.visible)
    finally:
        for worker in workers:
            worker.leave()
        for worker in workers:
            worker.stop()
