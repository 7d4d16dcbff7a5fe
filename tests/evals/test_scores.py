"""Scores of what was measured, however far it is from sense."""

import math

import pytest

from osdn.evals.results import exp, score


@pytest.mark.parametrize("nats", [0.5, 708.0, 800.0, 1e300])
def test_a_perplexity_past_the_largest_float_is_infinite(nats):
    found = score("perplexity", [nats, nats], scale=exp)
    assert found["value"] == (math.exp(nats) if nats < 709 else math.inf)
    assert found["low"] == found["high"] == found["value"]
