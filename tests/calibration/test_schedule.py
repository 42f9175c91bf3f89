"""The learning rate over a stage's steps, by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_binq.calibration.schedule import cosine


@given(steps=st.integers(1, 300))
def test_the_factor_falls_along_a_cosine_and_stays_at_its_end(steps: int) -> None:
    factor = cosine(steps)
    for step in range(steps + 3):
        assert factor(step) == pytest.approx((1 + math.cos(math.pi * min(step, steps) / steps)) / 2, abs=1e-12)
    assert factor(0) == 1.0


def test_a_stage_without_steps() -> None:
    assert cosine(0)(0) == 1.0
