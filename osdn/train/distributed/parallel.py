"""The processes of a run: who they are, and what they tell each other on the host.

torchrun starts every process with RANK, WORLD_SIZE and a place to meet in its environment; without
them the run is one process, and everything here is a no-op. Collectives on tensors of the model
belong to DDP and FSDP2 (`sharding`); these here carry counts, flags and small objects
over gloo, so that no accelerator waits for them.
"""

import os
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from osdn.errors import UserError
from osdn.train.recipe import Recipe

# All of them: RANK alone may be a scheduler's.
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

T = TypeVar("T")


def attempt() -> str:
    """How often torchrun has restarted the processes."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def environment_rank() -> int:
    """This process's number, from torchrun's environment; 0 without it."""
    return _number("RANK", 0)


def _number(name: str, default: int) -> int:
    """A number that torchrun leaves in the environment.

    Raises:
        UserError: something else is there.
    """
    text = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UserError(
            f"{name}: expected a number in the environment, as torchrun sets it, got {text!r}; "
            "unset it, or start the run with torchrun"
        )
    return int(text)


class Parallel:
    """This process among those of the run.

    rank, size: its number, and how many there are.  shard: how many divide the weights.
    device: what it computes on.  mesh: (replicate, shard), None for one process.
    saving: a group of its own for checkpoints, which are written by another thread.

    Raises:
        UserError: parallel.shard does not divide the processes, or the device is not there.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        options = recipe.parallel
        # A process by itself needs no group, and no port.
        launched = all(name in os.environ for name in LAUNCHED)
        self.rank = _number("RANK", 0) if launched else 0
        self.size = _number("WORLD_SIZE", 1) if launched else 1
        _number("MASTER_PORT", 0)  # PyTorch reads it
        if not self.rank < self.size:
            raise UserError(
                f"RANK, WORLD_SIZE: expected a rank below the number of processes, got {self.rank} "
                f"of {self.size}; start the run with torchrun"
            )
        # "all": FSDP2 over the whole run
        self.shard = self.size if options.shard == "all" else options.shard
        if self.size % self.shard:
            raise UserError(
                f"parallel.shard: {self.shard} does not divide the {self.size} processes of this "
                f"run; set it to a divisor, to 1 or to all, or start a multiple of {self.shard} "
                "processes (torchrun --nproc_per_node)"
            )
        self.device = device
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # what names no device (checkpoints' copies) means this
        self.mesh: DeviceMesh | None = None
        self.saving: dist.ProcessGroup | None = None
        if launched:
            self._meet(timedelta(seconds=options.timeout_seconds))

    def _meet(self, timeout: timedelta) -> None:
        # Two backends on a GPU: tensors go by nccl, counts and flags by gloo, beside it.
        backend = "gloo"
        if self.device.type == "cuda":
            self.device = torch.device("cuda", _number("LOCAL_RANK", 0))
            torch.cuda.set_device(self.device)
            backend = "cpu:gloo,cuda:nccl"
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=timeout)))
        # torchrun keeps its store when it restarts the processes: without a name of its own an
        # attempt could read the addresses that the one before left there, and wait for the dead.
        store = dist.PrefixStore(f"osdn-{attempt()}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        # A group of its own: the writer's collectives must not mix with the loop's.
        self.saving = dist.new_group(backend="gloo", timeout=timeout)
        shape = self.size // self.shard, self.shard  # replicate × shard
        self.mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))

    @property
    def main(self) -> bool:
        """Whether this is the process that writes the log and speaks to the user."""
        return self.rank == 0

    def total(self, count: int) -> int:
        """The sum of every process's count."""
        return self._reduce(count, dist.ReduceOp.SUM)

    def largest(self, number: int) -> int:
        """The largest of every process's numbers."""
        return self._reduce(number, dist.ReduceOp.MAX)

    def _reduce(self, number: int, how: Any) -> int:
        if self.size == 1:
            return number
        x = torch.tensor(number)  # on the CPU: no accelerator waits for it
        dist.all_reduce(x, how)
        return int(x)

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank, in every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, make: Callable[[], T]) -> T:
        """make() of rank 0, in every process.

        Raises:
            UserError: make raised it; in the other processes SystemExit, so that it is shown once.
        """
        outcome: list[Any] = [None, None]  # the value, the error's message
        if self.main:
            try:
                outcome[0] = make()
            except UserError as error:
                outcome[1] = str(error)
        if self.size > 1:
            # An error goes the same way as a value, so that nobody waits for one that gave up.
            dist.broadcast_object_list(outcome, src=0)
        value, message = outcome
        if message is not None:
            raise UserError(message) if self.main else SystemExit(1)
        return value

    def together(self, make: Callable[[], T]) -> T:
        """make() of every process in it, or an error in all if it fails in one.

        Raises:
            UserError: in the first process where make raised it; SystemExit in the others.
        """
        failure: UserError | None = None
        try:
            made = make()
        except UserError as error:
            failure = error
        # All hear of all before any of them leaves.
        failed = [rank for rank, bad in enumerate(self.gather(failure is not None)) if bad]
        if not failed:
            return made
        if failure is not None and self.rank == failed[0]:
            raise failure
        raise SystemExit(1)

    def close(self) -> None:
        """Leave the group."""
        if dist.is_initialized():
            dist.destroy_process_group()
