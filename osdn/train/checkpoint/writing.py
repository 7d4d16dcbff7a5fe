"""Checkpoints are written: by DCP, in another thread, under a temporary name (see checkpoint)."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint._hf_utils import (
    CUSTOM_METADATA_KEY,
    DCP_VERSION_KEY,
    FORMAT_KEY,
    FORMAT_VALUE,
    HF_DCP_VERSION,
    _gen_file_name,
)
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from osdn.system.files import TEMPORARY, sha256, sync
from osdn.train.checkpoint.reading import (
    MANIFEST,
    RECIPE,
    STATE,
    directories,
    remove_unfinished,
)
from osdn.train.distributed.parallel import Parallel


class _Writer(dcp.HuggingFaceStorageWriter):
    """Writes step_N under a temporary name; the last act, in rank 0 alone, gives it its name.

    Whatever goes wrong in one process, DCP tells all of them, and none goes on to the next stage.
    """

    def __init__(
        self,
        root: Path,
        state: dict[str, Any],
        recipe: dict,
        keep: int,
        lost: Callable[[], bool],
    ) -> None:
        # A name that directories() does not match until it is renamed.
        self.target = root / f"step_{state['step']}"
        self.unfinished = root / f"{TEMPORARY}{self.target.name}"
        super().__init__(str(self.unfinished), save_distributed=True)
        self.root, self.state, self.recipe, self.keep = root, state, recipe, keep
        self._lost = lost

    def _check_place(self) -> None:
        """Refuse to touch a directory that is no longer this run's."""
        if self._lost():
            raise OSError(errno.ENOENT, "the run's directory was removed or replaced")

    def prepare_local_plan(self, plan: Any) -> Any:
        """Nothing yet: a leftover may bear the directory's name."""
        return plan

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        """In rank 0, before anyone writes."""
        # At the start and before the rename: a save takes minutes, and much can happen.
        self._check_place()
        self.root.mkdir(exist_ok=True)  # without its parents: a run that was removed stays removed
        remove_unfinished(self.root)
        self.unfinished.mkdir()
        return super().prepare_global_plan(plans)

    def write_data(self, plan: Any, planner: Any) -> Any:
        """In every process; results are names and digests in place of DCP's, which are not used.

        The file is what DCP would write. DCP makes it whole in memory and then writes it, which
        takes the checkpoint's size once more, and where memory comes slowly most of the time.
        """
        future: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        if not plan.items:
            future.set_result([])
            return future
        # One file a process, by the index that DCP gave to its plan.
        path = self.unfinished / _gen_file_name(1, 1, plan.storage_data["shard_index"])
        tensors, offsets = {}, {}
        for item in plan.items:
            # From the copy on the host: training goes on with the originals.
            tensors[item.index.fqn] = planner.resolve_data(item).contiguous()
            offsets[item.index.fqn] = {"saved_offsets": item.tensor_data.chunk.offsets}
        metadata = {CUSTOM_METADATA_KEY: json.dumps(offsets), DCP_VERSION_KEY: str(HF_DCP_VERSION)}
        try:
            save_file(tensors, path, {**metadata, FORMAT_KEY: FORMAT_VALUE})
        except SafetensorError as error:
            raise _refusal(error) from error
        path.chmod(self.unfinished.stat().st_mode & 0o666)  # it lets nobody else read
        sync(path)  # before its name is made: a rename may reach the disk earlier than the content
        # The digest is made here, where the file is in the page cache, by every process at once.
        result = WriteResult(plan.items[0].index, path.stat().st_size, {path.name: sha256(path)})
        future.set_result([result])
        return future

    def finish(self, metadata: Any, results: list[list[Any]]) -> None:
        """In rank 0, after everyone has written."""
        digests = {
            name: digest
            for result in results
            for one in result
            for name, digest in one.storage_data.items()
        }
        for name, content in ((STATE, self.state), (RECIPE, self.recipe)):
            (self.unfinished / name).write_text(json.dumps(content, indent=1))
            digests[name] = sha256(self.unfinished / name)
        # Last of the files: it names all others.
        (self.unfinished / MANIFEST).write_text(json.dumps(digests, indent=1))
        for name in (STATE, RECIPE, MANIFEST):
            sync(self.unfinished / name)
        sync(self.unfinished)
        self._check_place()
        # Atomic. Before it there is no checkpoint, after it a whole one.
        os.rename(self.unfinished, self.target)
        sync(self.root)
        # Only after the new one is there.
        remove_old(self.root, self.keep)


def remove_old(root: Path, keep: int) -> None:
    """Delete all checkpoints but the newest, as many as are kept."""
    for old in directories(root)[keep:]:
        shutil.rmtree(old, ignore_errors=True)


def _refusal(error: SafetensorError) -> OSError:
    """What the system refused, which safetensors tells in words: "... (os error 28)"."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))


class Saver:
    """Saves the run's checkpoints in another thread, one at a time.

    Args:
        root: the directory of all checkpoints.
        keep: how many of the newest are kept.
        lost: whether the run's directory is no longer this run's; asked in rank 0.
    """

    def __init__(
        self, root: Path, parallel: Parallel, *, keep: int, lost: Callable[[], bool]
    ) -> None:
        self.root, self.parallel, self.keep, self.lost = root, parallel, keep, lost
        self._stager = self._new_stager()
        self.step = 0  # of the save that was started last
        self._pending: Any = None

    def _new_stager(self) -> DefaultStager:
        """What copies the tensors to the host."""
        # Without pinned memory the copy waits for the device; with it, it runs beside it.
        pinned = self.parallel.device.type == "cuda"
        return DefaultStager(
            StagingOptions(
                use_pinned_memory=pinned,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=pinned,
            )
        )

    def start(self, tensors: dict[str, Tensor], state: dict[str, Any], recipe: dict) -> None:
        """Copy the tensors and begin to write; `finish` must have been called for the last one.

        All processes must call it together, with the same names and an equal state.
        """
        assert self._pending is None
        size, rank = self.parallel.size, self.parallel.rank
        mine = {  # what every process holds whole, each writes a share of
            name: tensor
            for i, (name, tensor) in enumerate(tensors.items())
            # A sharded tensor has a part in every process; a whole one needs a single writer.
            if isinstance(tensor, DTensor) or i % size == rank
        }
        self.step = state["step"]
        if torch.__version__ < "2.13":
            # torch 2.11 closes what a DefaultStager copies with after its first use; 2.13 does not.
            self._stager = self._new_stager()
        self._pending = dcp.async_save(
            mine,
            storage_writer=_Writer(self.root, state, recipe, self.keep, self.lost),
            process_group=self.parallel.saving,
            async_stager=self._stager,
        )

    @property
    def done(self) -> bool:
        """Whether a save was started and `finish` need not wait for it."""
        return self._pending is not None and self._pending.done()

    def finish(self) -> int | None:
        """Wait until the save that was started is done; its step, or None if there was none.

        Raises:
            OSError: a process could not write (the disk is full, ...), and the checkpoint is not
                there; the others are untouched. It is raised in all processes.
        """
        if self._pending is None:
            return None
        # Taken first, so that a save that failed is reported once.
        pending, self._pending = self._pending, None
        assert isinstance(pending, Future)
        try:
            pending.result()
        except CheckpointException as error:
            causes = [cause for cause, _ in error.failures.values()]
            refused = next((cause for cause in causes if isinstance(cause, OSError)), None)
            if refused is None:  # a mistake of ours: not to be taken for a full disk
                raise causes[0] from error
            # What was half written goes; in a directory of another run nothing is touched.
            if self.parallel.main and not self.lost():
                shutil.rmtree(self.root / f"{TEMPORARY}step_{self.step}", ignore_errors=True)
            raise refused from error
        return self.step

    def close(self) -> None:
        """Let go of the host's copy."""
        self._stager.close()
