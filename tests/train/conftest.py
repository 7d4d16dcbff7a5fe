"""What the tests of training share: one thread, and one run that ended without interruption.

One thread, since two that wait for each other on a busy machine take 100 times as long.
"""

import shutil

import pytest
import torch

from osdn.train import train
from tests.train.tiny import recipe, write_texts


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


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def finished(texts, tmp_path_factory):
    """The result of a run without interruption; nothing may change its directory."""
    return train(recipe(texts), tmp_path_factory.mktemp("finished"))


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, without its model, so that it is resumed."""
    shutil.copytree(finished.out, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    return tmp_path / "run"
