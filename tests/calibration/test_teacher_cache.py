"""The teacher's hidden states, kept: the same logits, losses and steps bit for bit, or the whole teacher after all."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, VOCAB, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, PreTrainedModel

from lit_binq.calibration import teacher_cache
from lit_binq.calibration.block_stage import BlockStage
from lit_binq.calibration.model_stage import ModelStage
from lit_binq.calibration.options import BlockTuning, ClosedForm, ModelTuning
from lit_binq.calibration.streams import StreamOptions
from lit_binq.calibration.teacher_cache import TeacherCache, cache_teacher
from lit_binq.calibration.workspace import Workspace

CPU = torch.device("cpu")
N, TRAIN, TOKENS, BATCH = 7, 5, 12, 2


def make_windows(n: int = N) -> Tensor:
    return torch.randint(VOCAB, (n, TOKENS), generator=torch.Generator().manual_seed(0))


def autocast(dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)


def odd_model(kind: str) -> PreTrainedModel:
    """A tiny model that does something to its logits behind the head: caps them, or scales them."""
    config = {"gemma2": Gemma2Config, "cohere": CohereConfig}[kind](
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for p in model.parameters():
            p.data = 0.5 * torch.randn_like(p)
    return model.eval()


@torch.no_grad()
def whole(teacher: PreTrainedModel, windows: Tensor) -> Tensor:
    return teacher(input_ids=windows, use_cache=False).logits


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.no_grad()
def test_logits_are_those_of_a_whole_pass(kind: str, tied: bool, dtype: torch.dtype | None) -> None:
    """Bit for bit, in float32 and under autocast, where half the room is enough for it."""
    teacher, windows = tiny_model(kind, tied=tied), make_windows()
    with autocast(dtype):
        cache = cache_teacher(teacher, windows, BATCH)
        assert cache is not None
        for first in range(0, N, BATCH):
            rows = torch.arange(first, min(first + BATCH, N))
            hidden = cache.hidden(rows)
            assert hidden.dtype == (dtype or torch.float32)
            assert torch.equal(cache.head(hidden), whole(teacher, windows[rows]))
        # In another order they are still the hidden states of those windows.
        rows = torch.tensor([6, 0, 3])
        assert torch.equal(cache.hidden(rows), torch.cat([cache.hidden(rows[i : i + 1]) for i in range(3)]))
        torch.testing.assert_close(cache.head(cache.hidden(rows)), whole(teacher, windows[rows]), rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_storing_less_than_the_head_sees_would_show() -> None:
    """The comparison can fail: float32 logits from hidden states rounded to bfloat16 are other logits."""
    teacher, windows = tiny_model("llama"), make_windows()
    cache = cache_teacher(teacher, windows, N)
    assert cache is not None
    hidden = cache.hidden(torch.arange(N))
    assert not torch.equal(cache.head(hidden.bfloat16().float()), whole(teacher, windows))


@pytest.mark.parametrize("kind", ["gemma2", "cohere"])
def test_models_that_do_more_to_their_logits_run_whole(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    teacher = odd_model(kind)
    with caplog.at_level("DEBUG", "lit_binq.calibration.teacher_cache"):
        assert cache_teacher(teacher, make_windows(), BATCH) is None
    assert [r.getMessage() for r in caplog.records] == [
        f"{type(teacher).__name__}: its logits are not its head's output; the teacher runs whole"
    ]
    assert not teacher.get_output_embeddings()._forward_pre_hooks


class Odd(nn.Module):
    """Stands for a model whose head is used in an unusual way."""

    def __init__(self, times: int, width: int = 8) -> None:
        super().__init__()
        self.head, self.times = nn.Linear(8, 16), times
        self.embeddings = nn.Embedding(VOCAB, 8)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        hidden = self.embeddings(input_ids)
        logits = hidden @ self.head.weight.T + self.head.bias
        for _ in range(self.times):
            logits = self.head(hidden)
        return type("Out", (), {"logits": logits})()


@pytest.mark.parametrize(("times", "cached"), [(0, False), (1, True), (2, False)])
def test_the_head_must_be_called_once(times: int, cached: bool) -> None:
    teacher: Any = Odd(times)
    assert (cache_teacher(teacher, make_windows(), BATCH) is not None) == cached
    assert not teacher.head._forward_pre_hooks


def test_a_model_without_a_head_runs_whole() -> None:
    teacher = tiny_model("llama")
    teacher.get_output_embeddings = lambda: None  # type: ignore[method-assign, assignment]  # as some models do
    assert cache_teacher(teacher, make_windows(), BATCH) is None


def test_hooks_are_gone_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_model("llama")
    head, forward, calls = teacher.get_output_embeddings(), teacher.forward, []

    def fails_later(**options: Any) -> Any:
        calls.append(options)
        if len(calls) > 2:
            raise RuntimeError("out of memory")
        return forward(**options)

    monkeypatch.setattr(teacher, "forward", fails_later)
    with pytest.raises(RuntimeError, match="out of memory"):
        cache_teacher(teacher, make_windows(), BATCH)
    assert not head._forward_pre_hooks


def test_the_cache_is_on_the_device_if_it_is_small_there(monkeypatch: pytest.MonkeyPatch) -> None:
    sample, cuda = torch.zeros(1, TOKENS, 8, dtype=torch.bfloat16), torch.device("cuda")
    size = 10 * TOKENS * 8 * 2
    for free, expected in ((4 * size, "cuda"), (4 * size - 1, "cpu")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 1 << 40))
        assert teacher_cache._place((10, TOKENS, 8), sample, cuda).type == expected
    assert teacher_cache._place((10, TOKENS, 8), sample, CPU).type == "cpu"


# ---- in the model stage --------------------------------------------------------------------------------------------


@contextmanager
def counted(teacher: nn.Module) -> Iterator[list[int]]:
    """How many windows each call of the teacher's first block got."""
    seen: list[int] = []
    handle = teacher.model.layers[0].register_forward_pre_hook(  # type: ignore[union-attr, operator]  # a LLaMA
        lambda _, args, kwargs: seen.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    try:
        yield seen
    finally:
        handle.remove()


def model_stage(teacher: PreTrainedModel, *, batch_windows: int = 8, lr_codes: float = 0.02) -> ModelStage:
    """The model stage behind the closed form of every block."""
    work = Workspace(teacher, make_windows(), N - TRAIN, CPU, StreamOptions(batch_windows=batch_windows), torch.float16)
    for i in range(len(work.blocks)):
        block = BlockStage(work, i, ClosedForm(), BlockTuning())
        block.enter()
        block.leave()
    stage = ModelStage(work, ModelTuning(epochs=1, lr_codes=lr_codes, lr_embeddings=0.01))
    stage.enter()
    return stage


def trained(stage: ModelStage, dtype: torch.dtype | None) -> tuple[list[float], list[Tensor]]:
    """Losses of a few steps and the parameters after them, as a trainer makes them: scored, stepped, scored."""
    losses = []
    with autocast(dtype):
        losses += [float(s) for held_out in (True, False) for s in stage.evaluate(held_out=held_out)]
    parameters = [p for group in stage.parameter_groups() for p in group["params"]]
    optimizer = torch.optim.AdamW(stage.parameter_groups(), weight_decay=0.0)
    for rows in ([0], [3], [4], [0]):
        optimizer.zero_grad()
        with autocast(dtype):
            loss = stage.loss(torch.tensor(rows))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    with autocast(dtype):
        losses += [float(s) for s in stage.evaluate(held_out=True)]
    return losses, [p.detach() for p in parameters]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_steps_are_those_of_the_whole_teacher(
    tied: bool, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and every parameter after a few steps, embeddings among them; the teacher's head must not follow those.

    One window a pass: matrix products of another batch size may round differently.
    """
    results = []
    for cached in (True, False):
        if not cached:
            monkeypatch.setattr("lit_binq.calibration.model_stage.cache_teacher", lambda *_: None)
        teacher = tiny_model("llama", tied=tied)
        stage = model_stage(teacher, batch_windows=1)
        results.append(trained(stage, dtype))
        assert (stage._cache is not None) == cached
    (losses, parameters), (plain_losses, plain_parameters) = results
    assert losses[4:8] == plain_losses[4:8]
    # Scores are in float32; kept targets have the precision of the steps, a whole teacher runs again.
    assert losses == (plain_losses if dtype is None else pytest.approx(plain_losses, rel=2e-3))
    assert all(torch.equal(a, b) for a, b in zip(parameters, plain_parameters, strict=True))
    assert len(set(losses)) > 6


def test_the_teacher_runs_once() -> None:
    """One window for the comparison, then all of them, however many epochs follow."""
    teacher = tiny_model("llama")
    stage = model_stage(teacher, batch_windows=3)
    with counted(teacher) as seen:
        for _ in range(3):
            trained(stage, None)
    assert seen == [1, 3, 3, 1]


def test_another_autocast_is_another_teacher() -> None:
    """Hidden states of float32 passes are not those of bfloat16 passes."""
    teacher = tiny_model("llama")
    stage = model_stage(teacher)
    rows = torch.tensor([0, 1])
    values = []
    for dtype in (None, torch.bfloat16, None):
        with autocast(dtype), counted(teacher) as seen:
            values.append(float(stage.loss(rows).detach()))
            stage.loss(rows)
        assert sum(seen) == 1 + N
    assert values[0] == values[2] != values[1]


def test_a_capping_model_is_tuned_on_its_capped_logits() -> None:
    teacher = odd_model("gemma2")
    stage = model_stage(teacher)
    rows = torch.tensor([2, 0])
    loss = float(stage.loss(rows).detach())
    assert stage._cache is None
    p, q = (torch.log_softmax(whole(m, make_windows()[rows]).double(), -1) for m in (teacher, stage.module))
    assert loss == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def test_a_cache_on_the_host_gives_its_rows() -> None:
    hidden = torch.arange(24.0).reshape(4, 2, 3)
    cache = TeacherCache(nn.Identity(), hidden, CPU)
    assert torch.equal(cache.hidden(torch.tensor([3, 1])), hidden[[3, 1]])
