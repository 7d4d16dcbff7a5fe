"""Damaged and hostile files: one line or a result; never a traceback, a hang, a pickle, all memory.

A minute in CI. For longer, with other inputs each time: `python -m tests.fuzz --minutes 10`.
"""

import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.guard import Finding, attempt
from tests.fuzz.hostile import KINDS, Damage
from tests.fuzz.targets import NAMES, Fixture, Target

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc of Linux")

fractions = st.floats(0, 1, exclude_max=True)
changes = st.lists(
    st.builds(Damage, st.sampled_from(KINDS), fractions, fractions, st.integers(0, 10**6)),
    min_size=1,
    max_size=3,
)


@pytest.fixture(scope="module")
def fixture(tmp_path_factory):
    return Fixture(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", NAMES)
def test_a_good_file_is_read(name, fixture, tmp_path):
    assert attempt(fixture.targets()[name], fixture.good, tmp_path / "copy", [], True) == "read"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_read_or_refused_in_one_line(name, fixture, tmp_path):
    target = fixture.targets()[name]

    @settings(
        max_examples=target.examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(changes, st.booleans())
    def check(some, seal):
        attempt(target, fixture.good, tmp_path / "copy", some, seal)

    check()


def loops(directory):
    while True:
        pass


def fills(directory):
    bytearray(8 << 30)


def unpickles(directory):
    import pickle

    pickle.loads(b"cos\nsystem\n(S'true'\ntR.")


def fails(directory):
    {}["key"]


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (loops, "processor time"),
        (fills, "MemoryError"),
        (unpickles, "a pickle"),
        (fails, "KeyError"),
    ],
)
def test_the_guard_finds_what_it_is_for(read, expected, fixture, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.fuzz.guard.CPU_SECONDS", 0.5)
    with pytest.raises(Finding, match=expected):
        attempt(Target("a.txt", read), fixture.good, tmp_path / "copy", [], False)
