"""Reading from a source that is slow to answer or fails now and then."""

import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import TypeVar

from tqdm import tqdm

from osdn.errors import UserError

TRIES = 6  # in a row without anything read
FIRST_WAIT = 1.0  # seconds; doubled after every failure, so 31 s in all
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)

T = TypeVar("T")


def persevere(read: Callable[[], Iterator[T]], where: Callable[[], str]) -> Iterator[T]:
    """The items of read(), which is called again where it fails and must then go on behind them.

    Args:
        where: names what is being read, for the messages.

    Raises:
        UserError: nothing came in TRIES tries in a row, or trying again is of no use.
    """
    # Something came: the source is alive, and the count starts again.
    failures = 0
    while True:
        try:
            for item in read():
                failures = 0
                yield item
            return
        except network_errors() as error:
            failures += 1
            reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
            reason = reason or type(error).__name__
            if isinstance(error, FINAL):  # waiting does not bring back a file
                raise UserError(f"data.corpus: cannot read {where()}: {reason}") from error
            if failures == TRIES:
                raise UserError(
                    f"data.corpus: cannot read {where()}: {reason}, {TRIES} times in a row; when "
                    "it can be read again, give the same command, which goes on from the last "
                    "checkpoint"
                ) from error
            wait = FIRST_WAIT * 2 ** (failures - 1)
            message = (
                f"cannot read {where()}: {reason}; try {failures + 1} of {TRIES} in {wait:g} s"
            )
            tqdm.write(message, file=sys.stderr)
            time.sleep(wait)


@cache
def network_errors() -> tuple[type[Exception], ...]:
    """OSError, and what the clients of the Hugging Face Hub raise for a failed connection."""
    found: list[type[Exception]] = [OSError]
    try:
        from aiohttp import ClientError

        found.append(ClientError)
    except ImportError:
        pass
    try:
        from httpx import HTTPError

        found.append(HTTPError)
    except ImportError:
        pass
    return tuple(found)
