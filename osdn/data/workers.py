"""Rows made ahead of time by worker processes, with an exact state.

PyTorch's DataLoader starts the workers and keeps their order; the state is our own: worker k of n
on rank r of w is rank r + k·w of n·w (see osdn.data.rows), and sends with every row where its lane
is behind it. So the state is that of the rows taken and not of those made, and it fits any other
number of workers and ranks. torchdata's StatefulDataLoader (0.11) is not used: its state is opaque
(meta-pytorch/data issue 1337) and is restored to the same number of workers only.
"""

import atexit
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from osdn.data.packing import Row
from osdn.data.rows import RankRows, RowSource
from osdn.errors import UserError
from osdn.system.processes import follow_parent, process_context

AHEAD = 64  # rows that a worker makes ahead

Made = tuple[Row, int, int, dict[str, Any]]


def open_rows(
    source: RowSource, *, rank: int = 0, world: int = 1, workers: int = 0
) -> "RankRows | WorkerRows":
    """This rank's rows: an endless iterator with state_dict, load_state_dict and close.

    Args:
        source: what the rows are.
        rank, world: which of them are given; osdn.data.rows says how.
        workers: processes that read and tokenize ahead, started at the first row; 0 does it in
            this process. It changes neither the rows nor their order nor what a state restores.
            Each costs a few seconds at the start and a copy of the tokenizer and shuffled block.
    """
    if workers == 0:
        return RankRows(source.lane, source.lanes, rank=rank, world=world)
    return WorkerRows(source, rank=rank, world=world, workers=workers)


class WorkerRows:
    """As RankRows, with the rows coming from processes."""

    def __init__(self, source: RowSource, *, rank: int, world: int, workers: int) -> None:
        self._source, self._total = source, world * workers
        self._ranks = [rank + world * worker for worker in range(workers)]
        self._rows: Iterator[Made | UserError] | None = None
        self._end: Callable[[], None] = _nothing
        self._load([])

    def _load(self, states: Sequence[dict[str, Any]]) -> None:
        """Set `_streams`, the workers' states by whose turn it is, and their `_order`."""
        found = []
        # A RankRows of each worker, only to see where its rows begin; nothing is read.
        for rank in self._ranks:
            rows = RankRows(self._source.lane, self._source.lanes, rank=rank, world=self._total)
            if states:
                rows.load_state_dict(states)
            (stream,) = rows.state_dict()["streams"]
            found.append((stream["next"], rank, stream))
        # Whose row comes first: the workers' rows are taken in turn.
        found.sort(key=lambda each: each[0])
        self._order = [rank for _, rank, _ in found]
        self._streams = [stream for _, _, stream in found]
        self._turn = 0
        self._states = list(states)

    def __iter__(self) -> "WorkerRows":
        return self

    def __next__(self) -> Row:
        if self._rows is None:
            self._rows = self._start()
            # It holds the workers' queues: collected together with them in a cycle, as after an
            # error whose traceback names these rows, they would be closed before the last word.
            self._end = weakref.finalize(self, _end_workers, self._rows)
            atexit.register(self._end)
        try:
            made = next(self._rows)
        except RuntimeError as error:
            if "exited unexpectedly" not in str(error):
                raise
            raise UserError(
                f"data.workers: {error}; it was killed, by the system where memory ran out: lower "
                "data.workers or data.shuffle_bytes, or ask for more memory"
            ) from error
        if isinstance(made, UserError):
            raise made
        # The worker's state comes with the row: of this row, not of the rows made ahead.
        row, following, position, lane = made
        stream = self._streams[self._turn]
        stream["next"], stream["lanes"][position] = following, lane
        self._turn = (self._turn + 1) % len(self._streams)
        return row

    def _start(self) -> Iterator[Made | UserError]:
        loader = DataLoader(
            _Worker(self._source, self._order, self._total, self._states),
            batch_size=None,  # a row at a time: batches are made by the step
            num_workers=len(self._order),
            collate_fn=_same,
            worker_init_fn=_prepare,
            multiprocessing_context=process_context(),
            prefetch_factor=AHEAD,
            generator=torch.Generator(),  # its own, so that the run's random numbers stay
        )
        return iter(loader)

    def state_dict(self) -> dict[str, Any]:
        """Where the rows after the last one taken are."""
        return {"streams": [{**s, "lanes": list(s["lanes"])} for s in self._streams]}

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """As RankRows.load_state_dict."""
        self.close()
        self._load(states)

    def close(self) -> None:
        """End the workers; done at the latest when Python ends, which would wait for them."""
        self._rows = None
        self._end()
        atexit.unregister(self._end)
        self._end = _nothing


def _nothing() -> None:
    """To end where no worker was started."""


def _end_workers(rows: Any) -> None:
    """Before multiprocessing waits for processes that take no SIGTERM."""
    workers = rows._workers
    rows._shutdown_workers()
    for worker in workers:
        worker.kill()  # one that is within a long document; it has nothing to lose


class _Worker(IterableDataset):
    """The rows of one worker, with what the process that takes them needs for its state."""

    def __init__(
        self, source: RowSource, order: list[int], total: int, states: list[dict[str, Any]]
    ) -> None:
        self.source, self.order, self.total, self.states = source, order, total, states

    def __iter__(self) -> Iterator[Made | UserError]:
        info = get_worker_info()
        assert info is not None
        rank, source = self.order[info.id], self.source
        # To the worker it looks like a run of as many ranks.
        rows = RankRows(source.lane, source.lanes, rank=rank, world=self.total)
        if self.states:
            rows.load_state_dict(self.states)
        positions = {index: i for i, index in enumerate(rows.owned)}
        try:
            while True:
                index = rows.next % source.lanes
                row = next(rows)
                yield row, rows.next, positions[index], rows.lane_state(index)
        except UserError as error:  # as a value: an exception would arrive with a traceback
            yield error
        finally:
            rows.close()


def _same(made: Any) -> Any:
    return made


def _prepare(worker: int) -> None:
    follow_parent()
