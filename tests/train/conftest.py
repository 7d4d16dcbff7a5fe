"""One thread for the tiny runs: two that wait for each other on a busy machine take 100 times."""

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For this process, and through the environment for those that the tests start."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("NUMBA_NUM_THREADS", "1")
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)
