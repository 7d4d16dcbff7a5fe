"""Kernels compiled ahead of their launch, all at once.

A kernel compiles when it is first launched, on one core and while the GPU waits: one after the
other the kernels of a prompt and of a decoding step take 15 to 20 s. Together they take as long as
the slowest, since Triton's passes run outside of Python's lock.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import triton
from triton import knobs


def compile_together(launch: Callable[[], object]) -> int:
    """Compile every kernel that `launch` launches and nobody has launched before; their number.

    `launch` runs once with those kernels left out, so that what it computes is of no use. What it
    does besides (PyTorch's own operations) is done. Kernels that other threads launch meanwhile
    compile and run as usual.
    """
    if knobs.runtime.interpret:  # which compiles nothing
        return 0
    thread = threading.get_ident()
    found: dict[str, Any] = {}  # what specialises a kernel -> its function

    def leave_out(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        if threading.get_ident() != thread:
            return False
        found[compile["specialization_data"]] = fn.jit_function
        return True  # Triton then neither compiles nor launches it

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = leave_out
    try:
        launch()
    finally:
        knobs.runtime.jit_cache_hook = before
    with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool):
        for data, function in found.items():
            function.preload(data)
    return len(found)
