"""What the benchmarks compute from what they measure."""

from pathlib import Path

import pytest

from benchmarks.train_scaling import communication


def test_communication_is_hidden_where_anything_else_runs():
    kernels = [
        ("gemm", (0.0, 4.0)),
        ("ncclDevKernel_AllReduce", (2.0, 6.0)),  # 2 hidden, 2 alone
        ("ncclDevKernel_AllGather", (5.0, 7.0)),  # 1 more alone
        ("norm", (9.0, 10.0)),  # after 2 in which nothing runs
    ]
    found = communication(kernels)
    assert found == pytest.approx({"seconds": 1e-5, "nccl": 0.5, "alone": 0.3, "busy": 0.8})
    assert communication([])["nccl"] == 0


def test_every_benchmark_stands_in_the_table():
    folder = Path(__file__).parents[2] / "benchmarks"
    page = (folder / "README.md").read_text()
    assert [path.name for path in folder.glob("*.py") if path.name not in page] == []
