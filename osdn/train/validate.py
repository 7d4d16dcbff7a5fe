"""Bits per byte of the held-out text, its batches dealt to the processes."""

import math
from collections.abc import Callable, Sequence

import torch

from osdn.data import Row, collate
from osdn.train.distributed.parallel import Parallel
from osdn.train.distributed.sharding import Sharded
from osdn.train.objective import inputs


@torch.no_grad()
def bits_per_byte(
    sharded: Sharded,
    rows: Sequence[Row],
    size: int,
    parallel: Parallel,
    *,
    at_once: int,
    cut_off: Callable[[], bool],
) -> float | None:
    """The summed loss of the rows, ends of documents included, over ln 2 and `size` bytes.

    Batches are summed in the order of the rows, whoever computed them. FSDP2's forward is
    collective, so that where batches run out a process repeats its last one, uncounted.

    Args:
        at_once: rows in a forward pass.
        cut_off: asked, in all processes together, before each pass; on True the result is None.
    """
    # Evaluation mode leaves out the z-loss and recomputation.
    sharded.objective.eval()
    batches = [rows[first : first + at_once] for first in range(0, len(rows), at_once)]
    nats: list[float] = []  # in float64 on the host: a sum of thousands
    for first in range(0, len(batches), parallel.size):
        if cut_off():
            return None
        # A process without a batch of its own takes part with the last one; it is not counted.
        own = first + parallel.rank
        batch = collate(batches[min(own, len(batches) - 1)])
        # A count of 1: the sum of the nats, whatever the number of targets.
        loss = sharded.evaluate(*inputs(batch, parallel.device), 1).item()
        nats += parallel.gather(loss)[: len(batches) - first]
    return sum(nats) / math.log(2) / size
