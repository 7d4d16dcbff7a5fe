"""What an input may not do: run long, take memory, read a pickle, end in a traceback."""

import io
import re
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from osdn.errors import UserError
from tests.fuzz.hostile import Damage, damaged
from tests.fuzz.targets import LONGEST, Target

CPU_SECONDS = 60.0  # of this process; an input takes two at most
MEMORY = 3 << 30  # bytes of address space more than before: threads reserve some and use none


class Finding(AssertionError):
    """What an input did that it must not."""


_watched = threading.local()


def _hear(event: str, args: tuple[Any, ...]) -> None:
    if getattr(_watched, "on", False) and event in ("pickle.find_class", "os.system"):
        raise Finding(f"a pickle was read or code was run: {event} {args}")


sys.addaudithook(_hear)


def _address_space() -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(r"VmSize:\s+(\d+) kB", text)
    assert found is not None
    return int(found[1]) * 1024


@contextmanager
def limits() -> Iterator[None]:
    """Within, memory and processor time are limited, and pickles are findings."""

    def too_long(number: int, frame: Any) -> None:
        raise Finding(f"took more than {CPU_SECONDS:g} s of processor time")

    load, before = torch.load, resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, too_long)

    def refuse(*args: Any, **options: Any) -> Any:
        raise Finding("torch.load was called")

    torch.load = refuse
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY, before[1]))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    _watched.on = True
    try:
        yield
    finally:
        _watched.on = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGPROF, handler)
        torch.load = load


def attempt(target: Target, good: Path, place: Path, changes: list[Damage], seal: bool) -> str:
    """Damage a copy of the good files and read it: "read" or "refused".

    Raises:
        Finding: it did anything else.
    """
    top = Path(target.path).parts[0]
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for name in {top, "recipe.yaml"}:
        source = good / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, place / name)
    path = place / target.path
    path.write_bytes(damaged(path.read_bytes(), changes))
    if seal and target.seal is not None:
        target.seal(path)
    try:
        quiet = io.StringIO()
        with redirect_stderr(quiet), redirect_stdout(quiet), limits():
            target.read(place)
    except UserError as error:
        message = str(error)
        if "\n" in message or len(message) > LONGEST:
            raise Finding(f"not one short line: {message[:500]!r}") from error
        return "refused"
    except Finding:
        raise
    except BaseException as error:
        raise Finding(f"{type(error).__name__}: {str(error)[:300]}") from error
    return "read"
