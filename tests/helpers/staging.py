"""What tests of stages share: a small workspace, its block stages run, a few steps."""

import torch
from conftest import VOCAB
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_binq.calibration.block_stage import BlockStage
from lit_binq.calibration.options import BlockTuning, ClosedForm
from lit_binq.calibration.stage import Stage
from lit_binq.calibration.streams import StreamOptions
from lit_binq.calibration.workspace import Workspace
from lit_binq.formats import BinaryLinear

CPU = torch.device("cpu")
TRAIN, HELD_OUT, TOKENS = 6, 2, 12


def make_windows(n: int = TRAIN + HELD_OUT, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (n, TOKENS), generator=torch.Generator().manual_seed(seed))


def workspace(
    teacher: PreTrainedModel, windows: Tensor | None = None, unquantized_dtype: torch.dtype = torch.float16
) -> Workspace:
    windows = make_windows() if windows is None else windows
    return Workspace(teacher, windows, HELD_OUT, CPU, StreamOptions(), unquantized_dtype)


def quantize(work: Workspace, form: ClosedForm | None = None, tuning: BlockTuning | None = None) -> PreTrainedModel:
    """Every block stage, without tuning steps."""
    for i in range(len(work.blocks)):
        stage = BlockStage(work, i, form or ClosedForm(), tuning or BlockTuning())
        stage.enter()
        stage.leave()
    return work.student


def step(stage: Stage, steps: int = 3) -> None:
    """A few optimizer steps, as a trainer would take them."""
    optimizer = torch.optim.AdamW(stage.parameter_groups(), weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        stage.loss(torch.arange(TRAIN)).backward()
        optimizer.step()


def packed(model: nn.Module) -> dict[str, BinaryLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, BinaryLinear)}


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in mine.items())


def differing_codes(a: dict[str, BinaryLinear], b: dict[str, BinaryLinear]) -> float:
    """Share of signs in which two sets of packed layers differ."""
    assert a.keys() == b.keys()
    signs = [torch.cat([layers[n].solution().B.flatten() for n in a]) for layers in (a, b)]
    return float((signs[0] != signs[1]).double().mean())
