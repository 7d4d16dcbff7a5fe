"""Which process do the others wait for? Heartbeats in torchrun's store, and a watcher in rank 0.

Each process counts the stages of its step (rows read, forward passes, the exchange of gradients)
in a key of the store. Where one stalls, the others wait for it in the next collective, so that
theirs is the larger count. A process that stalls between the same two stages as the others wait in,
inside a forward that FSDP2 gathers weights in, cannot be told from them; the timeout of the
collectives (parallel.timeout_seconds) ends that.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from osdn.train.distributed.parallel import Parallel, attempt

PREFIX = "osdn/heartbeat"


class Heartbeat:
    """Counts this process's stages; in rank 0 also watches all, and names the one that is behind.

    Args:
        seconds: for how long it has been behind when it is named; named once for each stage.
        tell: shows a line to the user.
    """

    def __init__(self, parallel: Parallel, *, seconds: float, tell: Callable[[str], None]) -> None:
        self.parallel, self.seconds, self.tell = parallel, seconds, tell
        self._count = 0
        # What the user needs to find the process: rank alone is no address.
        self._who = f"host {socket.gethostname()}, pid {os.getpid()}"
        self._store: dist.Store | None = None
        self._closed = threading.Event()
        self._watcher: threading.Thread | None = None
        if parallel.size == 1:
            return
        # A connection of its own: the group's would be busy in the collective that hangs.
        self._store = _connect(seconds)
        self.beat(0, "starting")
        dist.barrier(group=parallel.saving)  # every key is there
        if parallel.main:
            self._watcher = threading.Thread(target=self._watch, name="stall-watcher", daemon=True)
            self._watcher.start()

    def beat(self, step: int, stage: str) -> None:
        """This process begins a stage."""
        if self._store is not None:
            self._count += 1
            # One small write a stage. Reading it all is rank 0's work.
            value = json.dumps([self._count, step, stage, self._who])
            self._store.set(f"{PREFIX}/{self.parallel.rank}", value)

    def _watch(self) -> None:
        store, keys = _connect(self.seconds), range(self.parallel.size)
        seen: list[Any] = [None] * len(keys)
        since = [time.monotonic()] * len(keys)
        named: set[tuple[int, int]] = set()
        # A quarter of the limit: named at most so much too late.
        while not self._closed.wait(self.seconds / 4):
            try:
                values = store.multi_get([f"{PREFIX}/{key}" for key in keys])
            except (dist.DistError, RuntimeError):  # the store is gone: so is the run
                return
            now, beats = time.monotonic(), [json.loads(value) for value in values]
            # Equal counts mean that all wait or all work: nobody is behind.
            furthest = max(beat[0] for beat in beats)
            for rank, (count, step, stage, who) in enumerate(beats):
                # Its own clock here: the processes' clocks are not compared.
                if count != seen[rank]:
                    seen[rank], since[rank] = count, now
                waited = now - since[rank]
                if count < furthest and waited >= self.seconds and (rank, count) not in named:
                    named.add((rank, count))
                    self.tell(
                        f"WARNING: rank {rank} ({who}) stalls: for {waited:.0f} s at step {step}, "
                        f"{stage}; the others wait for it"
                    )

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        if self._watcher is not None:
            self._watcher.join()


def _connect(seconds: float) -> dist.Store:
    """A connection of its own to torchrun's store, apart for each restart of the processes."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=max(30.0, seconds))  # for the connection, not for the run
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    return dist.PrefixStore(f"osdn-{attempt()}", store)
