"""One run at a time in a directory: two would mix their logs and checkpoints."""

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from osdn.errors import UserError

LOCK = ".train.lock"
NONE_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of a file system without locks


class Lock:
    """A run's hold on its directory; it ends with the process that took it, however that ends."""

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, out / LOCK
        self._file: TextIO | None = None
        self._made = False  # the directory

    def take(self) -> None:
        """Take it, at once or not at all; where the file system has no locks, go on without.

        Raises:
            UserError: another process has it, or the directory cannot be made.
        """
        try:
            self._made = not self.out.exists()
            self.out.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._file.fileno()).st_nlink == 0:  # its holder has just removed it
                raise BlockingIOError
        except BlockingIOError as error:
            self._close()
            raise UserError(
                f"{self.out}: another process trains there; wait until it has ended, or give this "
                "run a directory of its own (--out)"
            ) from error
        except OSError as error:
            # A finished run may be read by those who cannot write there; others fail at the log.
            unwritable = error.errno in (errno.EACCES, errno.EROFS) and self.out.is_dir()
            if not unwritable and error.errno not in NONE_HERE:
                raise UserError(f"{self.out}: cannot write there: {error.strerror}") from error

    def release(self) -> None:
        """Let go; a directory that was made for the lock alone goes too."""
        if self._file is None:
            return
        with suppress(OSError):
            if self._made and [path.name for path in self.out.iterdir()] == [LOCK]:
                self.path.unlink()
                self.out.rmdir()
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None
