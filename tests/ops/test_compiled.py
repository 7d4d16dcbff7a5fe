"""What is the numba backend's own: threads, its machine-code cache, and what would crash it."""

import errno
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.numerics import make_inputs
from tests.ops.running import BOX, detached, everything, outputs

pytest.importorskip("numba")

from osdn.ops import numba as compiled
from osdn.ops.numba.vectors import entry


@pytest.fixture
def always_threads(monkeypatch):
    """As many threads as there are heads, however little there is to do."""
    monkeypatch.setattr(compiled, "WORTH_A_THREAD", 1)
    torch.set_num_threads(3)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_threads_change_no_bit(packed, always_threads):
    """Five sequences of unequal lengths and three heads, over three threads and over one."""
    lengths = {"sequences": 5} if packed else {}
    x = make_inputs(1 if packed else 5, 90, 3, 20, 37, dtype=torch.float32, **lengths)
    options = BOX | {"cu_seqlens": torch.tensor([0, 1, 50, 52, 80, 90]) if packed else None}
    several = everything(x, "numba", **options)
    torch.set_num_threads(1)
    assert same(several, everything(x, "numba", **options))


def test_calls_from_several_threads_at_once(always_threads):
    """As a server would: each gets its own result."""
    inputs = [make_inputs(2, 40, 2, 5, 7, seed=seed) for seed in range(4)]
    alone = [everything(x, "numba") for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda x: everything(x, "numba"), inputs * 5))
    assert all(same(a, b) for a, b in zip(together, alone * 5))


def _in_child(x: dict, results) -> None:
    torch.set_num_threads(3)
    results.put(outputs(x, "numba")["o"].tolist())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_forked_process_makes_its_own_threads(always_threads):
    """As a DataLoader's worker does: the parent's threads do not exist there.

    Without γ, whose exponential PyTorch would give to its own threads, and wait for ever.
    """
    x = detached(make_inputs(2, 40, 2, 5, 7, gamma=False))
    o = outputs(x, "numba")["o"].tolist()
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(x, results), daemon=True)
    child.start()
    child.join(1800)  # to end a hang
    assert child.exitcode == 0 and results.get() == o


def test_a_cache_that_cannot_be_written_costs_time_alone(monkeypatch):
    """A read-only installation without a home directory: numba finds no place, and compiles."""
    from numba.core import caching

    def refuse(self):
        raise OSError("read-only file system")

    monkeypatch.setattr(caching._CacheLocator, "ensure_cache_path", refuse)

    def double(x):
        return 2 * x

    assert entry(double)(21) == 42


def test_a_disk_that_fills_while_the_cache_is_written_costs_time_alone(monkeypatch):
    from numba.core import caching

    def full(self, data):
        tried.append(data)
        raise OSError(errno.ENOSPC, "No space left on device")

    tried = []
    monkeypatch.setattr(caching.IndexDataCacheFile, "_save_index", full)
    twice = entry(lambda x: 2 * x)
    assert twice(21) == 42 and tried


@pytest.mark.parametrize("ending", ["*.nbi", "*.nbc"], ids=["index", "code"])
@pytest.mark.parametrize("left", [0, 20], ids=["empty", "cut"])
def test_a_damaged_cache_is_written_anew(tmp_path, monkeypatch, ending, left):
    """As a power cut may leave it: no error, and sound again for whoever comes after."""
    from numba import config

    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))

    def loaded() -> int:
        """Whether a new dispatcher, as a new process makes one, found the machine code."""

        def double(x):
            return 2 * x

        compiled = entry(double)
        assert compiled(21) == 42
        return sum(compiled.stats.cache_hits.values())

    assert (loaded(), loaded()) == (0, 1)
    files = list(tmp_path.rglob(ending))
    assert len(files) == 1
    files[0].write_bytes(files[0].read_bytes()[:left])
    assert (loaded(), loaded()) == (0, 1)


def test_the_name_of_the_machine_code_is_that_of_all_its_files(tmp_path, monkeypatch):
    """An entry inlines functions of other files, whose changes numba's own cache does not see."""
    from osdn.ops.numba import vectors

    def name() -> str:
        def double(x):
            return 2 * x

        return entry(double).py_func.__qualname__

    monkeypatch.setattr(vectors, "__file__", str(tmp_path / "vectors.py"))
    (tmp_path / "precond.py").write_text("a = 1")
    before = name()
    assert name() == before
    (tmp_path / "precond.py").write_text("a = 2")
    assert name() != before
    kernels = Path(compiled.__file__).parent
    assert {"walk.py", "step.py", "precond.py", "memory.py"} <= {
        x.name for x in kernels.glob("*.py")
    }


AFTER_MAIN = """
import threading
import torch
from osdn.ops import numba as compiled, online_scaled_delta_rule

compiled.WORTH_A_THREAD = 1
torch.set_num_threads(2)
x = [torch.rand(1, 9, 4, 8) for _ in "qkv"] + [torch.rand(1, 9, 4)]
before = online_scaled_delta_rule(*x, backend="numba")[0]

def late():
    threading.main_thread().join()
    after = online_scaled_delta_rule(*x, backend="numba")[0]
    print(torch.equal(after, before), flush=True)

threading.Thread(target=late).start()
"""


def test_a_thread_that_outlives_the_main_one_still_computes():
    """As a server's thread at the end of the program: Python then has no pool to hand work to."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run(
        [sys.executable, "-c", AFTER_MAIN], env=environment, capture_output=True, text=True
    )
    assert run.stdout.split() == ["True"], run.stdout + run.stderr


def test_compiled_graph_with_wrong_offsets_is_an_error_not_a_crash():
    """torch.compile skips the front door's check; the kernels index memory with the offsets."""
    x = detached(make_inputs(1, 9, 2, 4, 6, sequences=2))

    def rule(cu_seqlens):
        return outputs(x, "numba", cu_seqlens=cu_seqlens)["o"]

    fast = torch.compile(rule, fullgraph=True, backend="aot_eager")
    assert torch.equal(fast(torch.tensor([0, 4, 9])), rule(torch.tensor([0, 4, 9])))
    with pytest.raises(
        ValueError, match="cu_seqlens: expected offsets from 0 to T = 9, got 0 to 90"
    ):
        fast(torch.tensor([0, 4, 90]))


@pytest.mark.parametrize("dtype, lanes", [(torch.float32, 32), (torch.float64, 16)])
@pytest.mark.parametrize("over", [-1, 0, 1])
def test_head_sizes_around_a_vector(dtype, lanes, over):
    """K and V one less, equal to and one more than one vector and two, all gradients."""
    for K, V in ((lanes + over, 2 * lanes + over), (2 * lanes + over, lanes + over), (1, 1)):
        x = make_inputs(1, 9, 2, K, V, dtype=dtype)
        got, want = (everything(x, backend, **BOX) for backend in ("numba", "reference"))
        bound = 1e-6 if dtype == torch.float32 else 1e-10
        for name, y in want.items():
            assert (got[name] - y).norm() <= bound * y.norm() + 1e-12, name


NO_OPENMP = """
import os, threading
import numpy, torch
from osdn.ops import online_scaled_delta_rule

def others():
    return len(os.listdir("/proc/self/task")) - threading.active_count()

def numbers(*shape):
    return torch.from_numpy(numpy.random.rand(*shape).astype("float32") / 8).requires_grad_()

torch.set_num_threads(2)
x = [numbers(1, 2048, 2, 32) for _ in "qkv"] + [numbers(1, 2048, 2), -numbers(1, 2048, 2).detach()]
S, d, do = numbers(1, 2, 32, 32), numbers(1, 2, 32), numbers(1, 2048, 2, 32).detach()
before = others()
results = online_scaled_delta_rule(
    *x, beta_aware=True, precond_min=0.0, precond_max=2.0, initial_state=S, initial_precond=d,
    output_final_state=True, backend="numba",
)
torch.autograd.grad(results, [*x[:4], S, d], (do, S.detach(), d.detach()))
started = others() - before
(x[4] + 1).exp()
print(started, others() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_no_openmp_thread_is_woken_that_would_spin_on_our_cores():
    """None is there after a call with everything on; one is after PyTorch's exp of as many."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run(
        [sys.executable, "-c", NO_OPENMP], env=environment, capture_output=True, text=True
    )
    assert run.stdout.split() == ["0", "1"], run.stdout + run.stderr
