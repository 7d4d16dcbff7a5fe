"""A directory has one holder, and the holder notices when it is no longer there."""

import errno
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext

import pytest

from osdn.errors import UserError
from osdn.system import locks
from osdn.system.locks import DirectoryLock


def lock(directory):
    return DirectoryLock(directory, ".lock", "somebody is there")


def test_one_holder_at_a_time_and_none_after_a_kill(tmp_path):
    code = (
        "import os, signal; from pathlib import Path; from osdn.system.locks import DirectoryLock\n"
        f"held = DirectoryLock(Path({str(tmp_path)!r}), '.lock', '')\n"
        "held.take(); print('held', flush=True); input()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"{tmp_path}: somebody is there"):
        lock(tmp_path).take()
    child.kill()
    child.communicate()
    mine = lock(tmp_path)
    mine.take()
    assert not mine.lost
    mine.release()


def test_a_directory_made_for_the_lock_goes_with_it(tmp_path):
    for fill in (False, True):
        mine = lock(tmp_path / "run")
        mine.take()
        if fill:
            (tmp_path / "run" / "file").touch()
        mine.release()
        assert (tmp_path / "run").exists() == fill


@pytest.mark.parametrize("anew", [False, True])
def test_a_removed_directory_is_noticed_and_left_alone(anew, tmp_path):
    mine = lock(tmp_path / "run")
    mine.take()
    mine.check()
    shutil.rmtree(tmp_path / "run")
    if anew:
        other = lock(tmp_path / "run")
        other.take()
    assert mine.lost
    with pytest.raises(UserError, match="removed or replaced while this process wrote"):
        mine.check()
    mine.release()
    if anew:
        other.check()
        other.release()


@pytest.mark.parametrize(("number", "goes_on"), [(errno.ENOLCK, True), (errno.EIO, False)])
def test_a_file_system_without_locks_is_used(number, goes_on, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.FileLock, "acquire", refuse)
    mine = lock(tmp_path / "run")
    with nullcontext() if goes_on else pytest.raises(UserError, match="cannot write there: Input"):
        mine.take()
    mine.release()
