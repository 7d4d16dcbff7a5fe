"""Runs that are killed at counted and at random moments end as if they had not been.

Nine kills here; `make kills` does a hundred.
"""

import sys

import pytest

from tools.kills import FORMS, campaign

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.slow
def test_killed_runs_end_as_if_they_had_not_been(tmp_path):
    kills, divergent = campaign(tmp_path / "kills", 9, seed=0)
    assert not divergent
    assert {kill.form for kill in kills} == set(FORMS) and len(kills) >= 9
