"""Kernels compiled ahead: which, once, and not those of other threads. No GPU is needed."""

import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton cannot be installed")

# In a process of its own: a stand-in for the driver names a GPU, and Triton really compiles.
PROGRAM = """
import os, sys, threading
os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, "benchmarks")
import torch
from contextlib import nullcontext
from compile_kernels import Absent
from triton import knobs
from triton.runtime import driver
driver.set_active(Absent(90))
from osdn.ops.triton import ahead, convolution
convolution.on_device = lambda x: nullcontext()
x, w = torch.randn(1, 40, 64, dtype=torch.bfloat16), torch.randn(64, 4)
launched = lambda: (convolution.forward(x, w, None, 32), convolution.forward(x, w, None, None),
                    convolution.forward(x, w, None, 32))
assert ahead.compile_together(launched) == 2
assert knobs.runtime.jit_cache_hook is None
again = []
knobs.runtime.jit_cache_hook = lambda **options: again.append(1) or True
try:
    launched()  # compiled: it gets as far as the GPU that is not there
except AttributeError as error:
    assert "launcher_cls" in str(error), error
assert again == []

def other():  # a thread that launches meanwhile is not left out: it asks to compile, and launches
    try:
        convolution.backward(x, x, w, None, 32)
    except AttributeError as error:
        seen.append(str(error))
seen = []
def meanwhile():
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
knobs.runtime.jit_cache_hook = None
assert ahead.compile_together(meanwhile) == 0
assert len(seen) == 1 and "launcher_cls" in seen[0], seen
print("fine")
"""


def test_every_kernel_once_and_those_of_other_threads_as_usual():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert run.stdout == "fine\n", run.stderr
