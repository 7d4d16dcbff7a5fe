"""A file is written whole or not at all, whatever happens while it is written."""

import errno
import os
import subprocess
import sys

import pytest

from osdn.system.files import TEMPORARY, replacing, sha256, write_json, write_whole


class Killed(BaseException):
    """Stands for what nobody catches."""


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), Killed()])
def test_the_old_file_stays_until_the_new_one_is_whole(call, error, tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    write_whole(path, "old")

    def fail(*_):
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)):
        write_whole(path, "new" * 1000)
    monkeypatch.undo()
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["page.html"]


def test_what_the_caller_raises_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"ä": 1})
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"half")
        _ = 1 / 0
    assert path.read_text() == '{\n "ä": 1\n}\n' and len(os.listdir(tmp_path)) == 1


KILLED = """
import os, signal, sys
from pathlib import Path
from osdn.system.files import replacing
with replacing(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_write_removes_what_kills_left_and_nothing_else(tmp_path):
    path = tmp_path / "result.json"
    write_whole(path, "old")
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", KILLED, str(path)]).returncode == -9
    leftovers = [name for name in os.listdir(tmp_path) if name.startswith(TEMPORARY)]
    assert len(leftovers) == 1 and path.read_text() == "old"  # the second removed the first's
    other = tmp_path / f"{TEMPORARY}another.json-00000000"
    other.touch()
    with replacing(path) as held:  # a writer that is alive keeps its own
        write_whole(path, "second")
        held.write(b"first")
    assert path.read_text() == "first"
    assert sorted(os.listdir(tmp_path)) == sorted([other.name, "result.json"])


def test_modes_links_and_devices_are_kept(tmp_path):
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to(path)
    write_whole(link, "new")
    assert link.is_symlink() and path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640
    write_whole(tmp_path / "fresh", b"\xff")
    (tmp_path / "plain").touch()
    assert (tmp_path / "fresh").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with replacing(type(path)(os.devnull)) as device:
        device.write(b"gone")
    assert not os.path.isfile(os.devnull)


def test_the_digest_is_sha256(tmp_path):
    write_whole(tmp_path / "abc", "abc")  # the example of FIPS 180-2
    assert sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea")
