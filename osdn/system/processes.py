"""How worker processes are started, and how they end with the run that started them."""

import multiprocessing
import os
import signal
from threading import Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # Windows has no ForkServerContext
    from multiprocessing.context import ForkServerContext, SpawnContext


def process_context() -> "ForkServerContext | SpawnContext":
    """Processes forked from a server that has no threads and no CUDA context, where there is one.

    The server imports this package once for all of them. Where there is none (Windows), they are
    started afresh.
    """
    # A fork of this process would copy CUDA's state, and threads that are gone.
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "osdn.data"])
    return context


def follow_parent() -> None:
    """Called in a worker: it lives as long as its parent, no longer, and no shorter.

    Ctrl-C and SIGTERM reach the whole group; the parent ends its workers when it is done. A parent
    that is killed cannot, and the number that os.getppid gives is the server's.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent()


def end_with_parent() -> None:
    """Called in a worker: it ends when its parent is gone, kill -9 included."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        # Blocks on the parent's sentinel, and uses no time; a kill -9 ends it too.
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()
