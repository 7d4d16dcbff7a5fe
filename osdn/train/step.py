"""One optimizer step: rows to gradient to update, over all processes of the run.

A step is launched and not waited for, so that a GPU that is done with it finds the next one's work:
whether it is finite is decided on the device, and its numbers are read when they are asked for.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from osdn.data import Batch, Row, collate
from osdn.train.distributed.parallel import Parallel
from osdn.train.distributed.sharding import Sharded
from osdn.train.log.precond import Measured, measured
from osdn.train.log.speed import Moment
from osdn.train.objective import inputs
from osdn.train.optim import TrainOptimizer, learning_rate
from osdn.train.recipe import Train


class StepOutcome(NamedTuple):
    """Of one step, the same in every process.

    loss: nats per token, the z-loss included.  norm: of the gradient before clipping.
    precond: see osdn.train.log.precond; None where it was not asked for.
    """

    loss: float
    norm: float
    lr: float
    precond: Measured | None

    @property
    def finite(self) -> bool:
        """Whether the weights were changed."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class LaunchedStep:
    """A step that may still be under way on the device.

    Args:
        numbers: [2], its loss and norm, on the device.
        lr, precond: see StepOutcome.
    """

    def __init__(self, numbers: Tensor, lr: float, precond: Measured | None) -> None:
        self.lr, self.precond = lr, precond
        self.numbers = numbers
        if numbers.is_cuda:  # read on the host without waiting for what is launched after it
            self.numbers = torch.empty(2, pin_memory=True).copy_(numbers, non_blocking=True)
        self.done = Moment(numbers.device)

    def outcome(self) -> StepOutcome:
        """Wait for the step, and read its numbers."""
        self.done.wait()
        loss, norm = self.numbers.tolist()
        return StepOutcome(loss, norm, self.lr, self.precond)


class Stepper:
    """Launches the steps of a run.

    Args:
        passes: forward passes in a step.
        beat: told of every stage, as beat(step, stage).
    """

    def __init__(
        self,
        sharded: Sharded,
        optimizer: TrainOptimizer,
        parallel: Parallel,
        options: Train,
        *,
        passes: int,
        beat: Callable[[int, str], None],
    ) -> None:
        self.sharded, self.optimizer, self.parallel = sharded, optimizer, parallel
        self.options, self.passes, self.beat = options, passes, beat

    def __call__(self, step: int, rows: Iterator[Row], *, measure: bool) -> LaunchedStep:
        """Launch step number `step`; one that is not finite changes nothing.

        The gradient is that of the mean over all targets of all processes' rows.
        """
        self.beat(step, "reading rows")
        batches = [
            collate([next(rows) for _ in range(self.options.rows)]) for _ in range(self.passes)
        ]
        # The loss is a mean over all targets of the step, so their number comes before the forward.
        # The first collective: here the others wait for one that reads slowly.
        self.beat(step, "counting targets")
        targets = self.parallel.total(sum(batch.targets for batch in batches))
        # The log's process measures; the others have rows of their own.
        loss, precond = self._backward(step, batches, targets, measure and self.parallel.main)
        self.beat(step, "reducing the gradient")
        # Without a limit the norm is still wanted, for the log and to find what is not finite.
        limit = self.options.optimizer.clip
        norm = self.sharded.clip(math.inf if limit is None else limit)
        # Loss and norm are kept on the device: reading them here would wait for the whole step.
        numbers = torch.stack([loss, norm]).float()
        # The rate of this step, counted from 1: no state of a scheduler has to be saved.
        lr = learning_rate(
            step,
            steps=self.options.steps,
            peak=self.options.optimizer.lr,
            schedule=self.options.schedule,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # The fused optimizer's own way to leave out a step, which torch.amp.GradScaler uses.
        self.optimizer.found_inf = (~numbers.isfinite().all()).float()  # type: ignore[union-attr]
        self.optimizer.step()
        self.optimizer.zero_grad()
        # Nothing was waited for: the caller reads it a step later.
        return LaunchedStep(numbers, lr, precond)

    def _backward(
        self, step: int, batches: list[Batch], targets: int, measure: bool
    ) -> tuple[Tensor, Measured | None]:
        """Accumulate the gradient; (loss over all processes, what the first pass measured)."""
        # Gradients add up over the passes; DDP and FSDP2 exchange them in the last one only.
        size, device = self.parallel.size, self.parallel.device
        # DDP and FSDP2 take the mean over the processes where the sum is wanted.
        count = targets / size if size > 1 else targets
        self.sharded.objective.train()
        # Summed on the device, as the parts come; the sum is what the log shows.
        loss, read = torch.zeros((), device=device), None
        for i, batch in enumerate(batches):
            self.beat(step, f"forward pass {i + 1} of {len(batches)}")
            # Preconditioners are measured in the first pass: one is enough, and hooks cost time.
            wanted = measured(self.sharded.model) if measure and i == 0 else nullcontext()
            # The forward too lies within: DDP decides there whether it will exchange.
            with self.sharded.accumulating(i == len(batches) - 1):
                with wanted as reader:
                    part = self.sharded(*inputs(batch, device), count)
                read = read or reader
                part.backward()  # each pass frees its graph before the next one makes its own
            # On the device; .item() here would wait for every pass.
            loss += part.detach()
        if size > 1:
            loss /= size  # each part was scaled by size for DDP's mean
            dist.all_reduce(loss)
        return loss, read() if read else None
