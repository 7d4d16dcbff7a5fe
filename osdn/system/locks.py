"""One process at a time in a directory: two would mix their files."""

import errno
import os
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from osdn.errors import UserError

# What file systems without locks answer.
NONE_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class DirectoryLock:
    """A process's hold on a directory; the system ends it with the process, however that ends.

    Args:
        directory: made if it is not there.
        name: of the lock file in it.
        busy: what the user is told when another process holds it.
    """

    def __init__(self, directory: Path, name: str, busy: str) -> None:
        self.directory, self.path, self.busy = directory, directory / name, busy
        self._lock: FileLock | None = None
        self._made = False  # the directory
        self._identity: tuple[int, int] | None = None  # of the lock file that is held

    def take(self) -> None:
        """Take it at once or not at all; where the file system has no locks, go on without.

        Raises:
            UserError: another process has it, or the directory cannot be made.
        """
        try:
            self._made = not self.directory.exists()
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = FileLock(str(self.path), timeout=0, thread_local=False)
            # At once: who waits for a lock looks like a run that hangs.
            lock.acquire(blocking=False)
            self._lock, self._identity = lock, _identity(self.path)
            # Removed between opening and locking: the lock is of a file without a name.
            if self._identity is None:  # its holder has just removed it
                raise Timeout(str(self.path))
        except Timeout as error:
            self.release()
            raise UserError(f"{self.directory}: {self.busy}") from error
        except NotImplementedError:  # what filelock makes of ENOSYS
            return
        except OSError as error:
            # A finished run may be read by those who cannot write there; others fail at the log.
            unwritable = error.errno in (errno.EACCES, errno.EROFS) and self.directory.is_dir()
            if not unwritable and error.errno not in NONE_HERE:
                reason = error.strerror or error
                raise UserError(f"{self.directory}: cannot write there: {reason}") from error

    @property
    def lost(self) -> bool:
        """Whether the directory, or the lock file in it, is no longer the one that was taken."""
        if self._identity is None:
            return not self.directory.is_dir()
        # Another file of the same name is another run's lock.
        return _identity(self.path) != self._identity

    def check(self) -> None:
        """Stop before anything is written into another process's directory.

        Raises:
            UserError: the directory was removed or replaced.
        """
        if self.lost:
            raise UserError(
                f"{self.directory}: the directory was removed or replaced while this process wrote "
                "into it; nothing more is written there. Give the command again to start anew"
            )

    def release(self) -> None:
        """Let go; a directory that was made for the lock alone is removed."""
        if self._lock is None:
            return
        with suppress(OSError):
            # Only a directory that was made for the lock, and holds nothing else.
            mine = self._made and not self.lost
            if mine and [path.name for path in self.directory.iterdir()] == [self.path.name]:
                self.path.unlink()
                self.directory.rmdir()
        self._lock.release()
        self._lock = self._identity = None


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and number of a file; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
