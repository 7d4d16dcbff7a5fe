"""SIGINT and SIGTERM as a flag that the loop looks at between steps."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, Self


class Signals:
    """While open, a first Ctrl-C or SIGTERM is noted in `received`; a second Ctrl-C stops at once.

    Outside the main thread, where Python cannot handle signals, nothing is changed.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Only there does Python deliver signals.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt  # the second Ctrl-C: the user will not wait for the step
        self.received = number

    def leave(self) -> NoReturn:
        """End as the signal asks: KeyboardInterrupt (exit code 130), or SystemExit(143)."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)


@contextmanager
def sigterm_exits() -> Iterator[None]:
    """While open, SIGTERM raises SystemExit(143) in the main thread: what is in `finally` runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
