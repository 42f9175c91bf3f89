"""When codes may flip: by hand and in a whole fit."""

import itertools
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fitting import fit
from lit_binq.calibration.schedule import rate_factors
from lit_binq.calibration.stages import CODES, Tuning
from lit_binq.errors import LitBinqError


@settings(deadline=None, max_examples=60)
@given(
    after=st.floats(0, 0.9),
    length=st.floats(0.05, 1),
    steps=st.integers(1, 300),
    final=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_factors_are_a_cosine_and_codes_take_their_share(after: float, length: float, steps: int, final: float) -> None:
    until = min(after + length, 1.0)
    tuning = Tuning(epochs=1, final_lr=final, codes_after=after, codes_until=until)
    scales, codes = rate_factors(tuning, steps, [{"kind": ""}, {"kind": CODES}])
    for step in range(steps + 2):
        done = min(step / steps, 1)
        cosine = final + (1 - final) * (1 + math.cos(math.pi * done)) / 2
        assert scales(step) == pytest.approx(cosine, abs=1e-12)
        if abs(done - after) * steps > 1e-6 and abs(done - until) * steps > 1e-6:
            assert codes(step) == (scales(step) if after < done < until or (until == 1 and done > after) else 0.0)


def test_by_default_codes_follow_all_others() -> None:
    scales, codes = rate_factors(Tuning(epochs=1), 10, [{}, {"kind": CODES}])
    assert [codes(i) for i in range(13)] == [scales(i) for i in range(13)]
    assert codes(0) == 1.0


def test_shares_of_steps_are_whole_steps() -> None:
    """0.07 * 100 is above 7 in floating point, 0.55 * 100 above 55."""
    (codes,) = rate_factors(Tuning(epochs=1, codes_after=0.07, codes_until=0.55), 100, [{"kind": CODES}])
    assert [i for i in range(110) if codes(i)] == list(range(7, 55))


class Watch(pl.Callback):
    """For each step of each stage: which kinds of parameters changed."""

    def __init__(self) -> None:
        self.moved: list[list[set[str]]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.stage = module.stage_index
        self.before = [[(g["kind"], p, p.detach().clone()) for p in g["params"]] for g in module._groups]

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        while len(self.moved) <= self.stage:
            self.moved.append([])
        moved = {kind for group in self.before for kind, p, old in group if not torch.equal(p, old)}
        self.moved[self.stage].append(moved)


def test_a_fit_moves_codes_in_their_time_only(make_source: Any, text_file: Path, tmp_path: Path) -> None:
    """10 steps a stage, in blocks and in the model stage; scales move in all of them (but the cosine's very end)."""
    watch = Watch()
    schedule = {"epochs": 5, "patience": 0, "codes_after": 0.2, "codes_until": 0.7, "final_lr": 0.1}
    fit(make_source(blocks=1), text_file, tmp_path / "packed", callbacks=[watch],
        tuning=Tuning(lr_codes=0.05, **schedule), finish=Tuning(lr_codes=0.02, **schedule),
        data={"batch_size": 8})  # fmt: skip
    expected = [{""}] * 2 + [{"", CODES}] * 5 + [{""}] * 3
    assert watch.moved == [expected, expected]


def test_frozen_codes_are_frozen_for_any_optimizer_state() -> None:
    """After the share is over, AdamW's moments are large and its rate is 0."""
    p = nn.Parameter(torch.randn(50, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.AdamW([{"params": [p], "lr": 0.1, "kind": CODES}], weight_decay=0.0, betas=(0.9, 0.95))
    factors = rate_factors(Tuning(epochs=1, codes_until=0.5), 10, optimizer.param_groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    values = [p.detach().clone()]
    for _ in range(10):
        (p**2).sum().backward()
        optimizer.step()
        schedule.step()
        values.append(p.detach().clone())
    assert [not torch.equal(a, b) for a, b in itertools.pairwise(values)] == [True] * 5 + [False] * 5


def test_a_checkpoint_of_another_schedule_is_refused(make_source: Any, text_file: Path, tmp_path: Path) -> None:
    source = make_source(blocks=1)
    fit(source, text_file, tmp_path / "one", tuning=Tuning(epochs=1), finish=Tuning(epochs=0))
    with pytest.raises(LitBinqError, match="another options"):
        fit(source, text_file, tmp_path / "two", ckpt_path=tmp_path / "one-ckpt" / "last.ckpt",
            tuning=Tuning(epochs=1, codes_until=0.5), finish=Tuning(epochs=0))  # fmt: skip
