"""How far the run is: a bar on a terminal, else a line at once and every half minute."""

import sys
import time
from typing import Self

from tqdm import tqdm

INTERVAL = 30.0  # seconds between lines where no terminal shows a bar


class Progress:
    """Shows the run's steps to the user.

    Args:
        total, done: steps of the whole run, and those behind it.
        show: False in all processes but one, and where the recipe asks for silence.
        about: what is trained, for the first line.
    """

    def __init__(self, *, total: int, done: int, show: bool, about: str) -> None:
        self.total, self.done = total, done
        # In a file a bar would be thousands of lines.
        terminal = show and sys.stderr.isatty()
        self._lines = show and not terminal
        self._bar = tqdm(total=total, initial=done, unit="step", disable=not terminal)
        self._told = time.monotonic()
        if self._lines:
            print(f"{about}: step {done:,} of {total:,}", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, shown: str) -> None:
        """A step more; `shown` is what to say of it."""
        self.done += 1
        # refresh=False: `update` below draws it, and not more often than is seen.
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update()
        now = time.monotonic()
        # a GPU's first step has nothing to show yet
        if self._lines and shown and now - self._told >= INTERVAL:
            self._told = now
            line = f"step {self.done:,} of {self.total:,}: {shown}"
            print(line, file=sys.stderr, flush=True)
