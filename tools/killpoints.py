"""Kill this process with SIGKILL at the n-th file operation of a kind, within a training run.

Moments are counted and not timed, so that a slow machine kills at the same place. Python raises an
audit event before it opens, renames, removes or cuts off a file; `os.fsync` and the two writers
that raise none (of tensors, of the log) are wrapped. A kill before each operation sees every state
of the disk between two of them; the two writers are killed with half of their bytes written.
"""

import os
import signal
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

# Kinds of moments, in the order in which a save passes them, and what they are called in reports.
MOMENTS = {
    "leftovers": "a leftover of an earlier kill is removed",
    "tensors": "half of a file of tensors is written",
    "notes": "state, recipe or manifest is written",
    "rename": "before a checkpoint gets its name",
    "renamed": "after it, before the directory is synced",
    "removal": "an old checkpoint is removed",
    "log": "half of a log line is written",
    "cut": "the log is cut off at resumption",
    "export": "the finished model is written or renamed",
}


class Counted:
    """Counts the moments of one process and kills it at one of them.

    Args:
        out: the run's directory.
        moment: a key of MOMENTS; empty to kill at none.
        number: which one of that kind, from 1.
        record: a file that gets the name of each moment, a line each.
    """

    def __init__(self, out: Path, moment: str, number: int, record: Path | None = None) -> None:
        self.out, self.moment, self.number = out.resolve(), moment, number
        self.met: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._here = threading.local()  # .tree: what shutil.rmtree of this thread removes
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._record = None if record is None else os.open(record, flags, 0o644)

    def is_last(self, moment: str) -> bool:
        """Count a moment; whether the process must end in it."""
        with self._lock:
            self.met[moment] += 1
            if self._record is not None:
                os.write(self._record, moment.encode() + b"\n")
            return moment == self.moment and self.met[moment] == self.number

    def pass_by(self, moment: str | None) -> None:
        """Count a moment before its operation."""
        if moment is not None and self.is_last(moment):
            die()

    def heard(self, event: str, args: tuple[Any, ...]) -> None:
        """The audit hook."""
        if event == "shutil.rmtree":
            self._here.tree = str(args[0])
        elif event in ("os.remove", "os.rmdir"):
            # rmtree names files by a descriptor of their directory, and only itself by its path.
            within = args[1] != -1 or str(args[0]) == getattr(self._here, "tree", "")
            self.pass_by(self.removed() if within else None)
        elif event == "os.rename":
            self.pass_by(self.placed(str(args[0]), renamed=True))
        elif event == "os.truncate" and str(args[0]).endswith("log.jsonl"):
            self.pass_by("cut")
        elif event == "open" and isinstance(args[0], str | os.PathLike) and writes(args[2]):
            self.pass_by(self.placed(os.fspath(args[0])))

    def removed(self) -> str | None:
        """The moment of a removal within shutil.rmtree."""
        tree = Path(getattr(self._here, "tree", ""))
        if tree.parent.name != "checkpoints":
            return None
        return "removal" if tree.name.startswith("step_") else "leftovers"

    def placed(self, path: str, *, renamed: bool = False) -> str | None:
        """The moment of an operation on a path."""
        full = os.path.abspath(path)
        if not full.startswith(str(self.out)):
            return None
        if ".writing-model" in full:
            return "export"
        if ".writing-step_" in full:
            return "rename" if renamed else "notes"
        return None

    def synced(self, descriptor: int) -> None:
        """Before os.fsync."""
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        self.pass_by("renamed" if path == f"{self.out}/checkpoints" else self.placed(path))


def writes(flags: int) -> bool:
    """Whether a file is opened to be written."""
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def die() -> None:
    """End at once, as by the system where memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()  # the signal may take effect a moment later


def arm(out: str, moment: str, number: int, record: str | None = None) -> None:
    """Called in a process before it trains; arguments as Counted's."""
    from osdn.train.checkpoint import writing
    from osdn.train.log.run_log import RunLog

    counted = Counted(Path(out), moment, number, None if record is None else Path(record))
    save, sync, start = writing.save_file, os.fsync, RunLog.__init__

    def half_saved(tensors: Any, path: Path, metadata: Any) -> None:
        save(tensors, path, metadata)
        if counted.is_last("tensors"):
            os.truncate(path, path.stat().st_size // 2)
            die()

    def counted_sync(descriptor: int) -> None:
        counted.synced(descriptor)
        sync(descriptor)

    def with_counted_file(self: RunLog, *args: Any, **options: Any) -> None:
        start(self, *args, **options)
        self._file = HalfWritten(self._file, counted)  # type: ignore[assignment]

    writing.save_file = half_saved  # type: ignore[assignment]
    os.fsync = counted_sync  # type: ignore[assignment]
    RunLog.__init__ = with_counted_file  # type: ignore[method-assign]
    sys.addaudithook(counted.heard)


class HalfWritten:
    """The log's file; at the chosen write it takes half of the bytes."""

    def __init__(self, file: Any, counted: Counted) -> None:
        self.file, self.counted = file, counted

    def write(self, data: bytes) -> int:
        """As the file's."""
        if self.counted.is_last("log"):
            self.file.write(data[: len(data) // 2])
            die()
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)
