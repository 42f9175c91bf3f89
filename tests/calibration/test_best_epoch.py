"""Which epoch of a stage is kept, and when it is over, against a plain loop over all scores."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_binq.calibration.best_epoch import BestEpoch

scores = st.lists(st.one_of(st.integers(0, 5).map(float), st.just(math.inf), st.just(math.nan)), min_size=1, max_size=9)


@settings(deadline=None, max_examples=200)
@given(scores=scores, before=st.integers(0, 5).map(float), epochs=st.integers(1, 9))
def test_the_first_of_the_lowest_is_kept(scores: list[float], before: float, epochs: int) -> None:
    p = nn.Parameter(torch.zeros(2))
    kept = BestEpoch([p], before, epochs)
    seen = [before]
    for i, score in enumerate(scores, 1):
        with torch.no_grad():
            p.fill_(i)  # what the optimizer makes of it
        seen.append(score)
        lowest = min((s for s in seen if not math.isnan(s)), default=math.nan)
        best = seen.index(lowest)
        over = i >= epochs
        assert kept.add(score) == over
        assert (kept.kept, kept.score, kept.epoch) == (best, lowest, i)
        if over:
            break
    kept.restore()
    assert p.tolist() == [float(kept.kept)] * 2
    assert kept.before == before


def test_a_stage_without_parameters() -> None:
    kept = BestEpoch([], 1.0, 0)
    kept.restore()
    assert (kept.kept, kept.score, kept.epoch) == (0, 1.0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_a_copy(dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.ones(3, dtype=dtype))
    kept = BestEpoch([p], 1.0, 3)
    with torch.no_grad():
        p.zero_()
    kept.restore()
    assert p.tolist() == [1, 1, 1]
    assert p.requires_grad
