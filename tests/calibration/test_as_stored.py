"""Held-out scores are those of what would be stored, whatever precision steps run in."""

import math

import pytest
import torch
from conftest import tiny_model

from lit_binq.calibration.as_stored import as_stored
from lit_binq.calibration.best_epoch import BestEpoch
from lit_binq.calibration.block_stage import BlockStage
from lit_binq.calibration.model_stage import ModelStage
from lit_binq.calibration.options import BlockTuning, ClosedForm, ModelTuning
from lit_binq.calibration.stage import Stage
from lit_binq.formats import LatentLinear, PackedLinear
from lit_binq.models.blocks import find_layers, norm_parameters, run_block
from staging import TRAIN, quantize, step, workspace


def block_stage() -> BlockStage:
    stage = BlockStage(workspace(tiny_model("llama")), 0, ClosedForm(), BlockTuning(epochs=1))
    stage.enter()
    return stage


def model_stage() -> ModelStage:
    work = workspace(tiny_model("llama"))
    quantize(work)
    stage = ModelStage(work, ModelTuning(epochs=1, lr_embeddings=0.01))
    stage.enter()
    return stage


def value(stage: Stage) -> float:
    sums = stage.evaluate(held_out=True)
    return float(sums[0] / sums[1])


def test_a_module_is_as_it_was_afterwards() -> None:
    stage = block_stage()
    step(stage)
    before = {name: t.clone() for name, t in stage.module.state_dict().items()}
    objects = {name: id(p) for name, p in stage.module.named_parameters()}
    with as_stored(stage.module, torch.float16):
        assert not find_layers(stage.module, LatentLinear)
        assert find_layers(stage.module, PackedLinear)
        for p in norm_parameters(stage.module).values():
            assert torch.equal(p, p.half().float())
    after = stage.module.state_dict()
    assert before.keys() == after.keys()
    assert [name for name, t in before.items() if not torch.equal(t, after[name])] == []
    assert objects == {name: id(p) for name, p in stage.module.named_parameters()}


@pytest.mark.parametrize("make", [block_stage, model_stage])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_score_is_that_of_what_is_stored(make, autocast) -> None:
    """The score just before a stage ends, beside the loss of what it leaves behind."""
    stage = make()
    step(stage, 5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        stage.loss(torch.tensor([0]))
        score = value(stage)
    streams = stage.work.streams
    if isinstance(stage, BlockStage):
        x_tilde, y = (t[TRAIN:].clone() for t in (streams.x_tilde, streams.y))
    stage.leave()
    if isinstance(stage, BlockStage):
        with torch.no_grad():
            left = torch.div(*stage._criterion.sums(run_block(stage.work.blocks[0], x_tilde, stage.call), y))
    else:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # the targets of the same precision
            left = torch.div(*stage.evaluate(held_out=True))
    assert score == pytest.approx(float(left), rel=1e-6)


def test_autocast_would_keep_another_epoch() -> None:
    """Two epochs that bfloat16 orders the other way round: the one kept is the better one as stored."""
    stage = block_stage()
    latents = find_layers(stage.module, LatentLinear).values()
    scales = [p for layer in latents for p in layer.scale_parameters()]
    start = [p.detach().clone() for p in scales]
    rows = slice(TRAIN, None)
    streams = stage.work.streams

    def under_autocast() -> float:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return float(torch.div(*streams.block_error(stage.module, stage.call, rows, stage._criterion.sums)))

    def epoch(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p, first in zip(scales, start, strict=True):
                p.copy_(first * (1 + 2e-3 * torch.randn(p.shape, generator=generator)))

    scores = []
    for seed in range(40):
        epoch(seed)
        with torch.autocast("cpu", torch.bfloat16):
            scores.append((under_autocast(), value(stage)))
    rough, exact = zip(*scores, strict=True)
    better, worse = exact.index(min(exact)), rough.index(min(rough))
    assert better != worse, "autocast picks the same epoch: a case that shows nothing"
    kept = BestEpoch(scales, math.inf, 2)
    for seed in (worse, better):
        epoch(seed)
        with torch.autocast("cpu", torch.bfloat16):
            kept.add(value(stage))
    assert kept.kept == 2
