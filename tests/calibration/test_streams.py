"""The two activation streams: wherever they are kept, they hold what plain forward passes compute."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB
from torch import Tensor
from transformers import PreTrainedModel

from lit_binq.calibration.streams import StreamOptions, Streams
from lit_binq.diagnostics.similarity import token_error_sums
from lit_binq.errors import LitBinqError
from lit_binq.models.blocks import BlockCall, capture_calls, find_blocks

CPU = torch.device("cpu")
N, TOKENS, HELD_OUT = 5, 8, 2


def windows() -> Tensor:
    return torch.randint(VOCAB, (N, TOKENS), generator=torch.Generator().manual_seed(0))


class Setting:
    """A teacher, a student that differs from it everywhere, and streams between the two."""

    def __init__(self, make_model: Callable[..., PreTrainedModel], kind: str = "llama", **options: Any) -> None:
        self.teacher, self.student = make_model(kind, seed=0), make_model(kind, seed=1)
        self.blocks = find_blocks(self.teacher), find_blocks(self.student)
        self.calls: list[BlockCall] = capture_calls(self.teacher, self.blocks[0], windows()[:1])
        self.streams = Streams(windows(), HELD_OUT, CPU, StreamOptions(**options))
        self.streams.start((self.teacher, self.blocks[0]), (self.student, self.blocks[1]))

    def advance(self, i: int) -> None:
        self.streams.compute_targets(self.blocks[0][i], self.calls[i])
        self.streams.advance(self.blocks[1][i], self.calls[i])


@pytest.fixture
def setting(make_model: Callable[..., PreTrainedModel]) -> Iterator[Callable[..., Setting]]:
    """Makes settings and closes their streams at the end."""
    made: list[Setting] = []

    def make(*args: Any, **options: Any) -> Setting:
        made.append(Setting(make_model, *args, **options))
        return made[-1]

    yield make
    for s in made:
        s.streams.close()


def states(model: PreTrainedModel) -> list[Tensor]:
    """Inputs of every block, and the last block's output, from hooks on one ordinary forward pass."""
    seen: list[Tensor] = []
    blocks = find_blocks(model)
    handles = [b.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for b in blocks]
    handles.append(blocks[-1].register_forward_hook(lambda _, args, out: seen.append(out)))
    with torch.no_grad():
        model(input_ids=windows(), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("kind", ["llama", "opt", "qwen2"])
@pytest.mark.parametrize("batch_windows", [1, 2, 8])
def test_streams_are_plain_forward_passes(setting: Callable[..., Setting], kind: str, batch_windows: int) -> None:
    s = setting(kind, batch_windows=batch_windows)
    x, x_tilde = states(s.teacher), states(s.student)
    for i in range(2):
        torch.testing.assert_close(s.streams.x, x[i], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(s.streams.x_tilde, x_tilde[i], rtol=1e-5, atol=1e-5)
        s.streams.compute_targets(s.blocks[0][i], s.calls[i])
        torch.testing.assert_close(s.streams.y, x[i + 1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(s.streams.x, x[i], rtol=1e-5, atol=1e-5)  # not overwritten yet
        s.streams.advance(s.blocks[1][i], s.calls[i])
    torch.testing.assert_close(s.streams.x, x[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(s.streams.x_tilde, x_tilde[2], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(x[2], x_tilde[2], atol=0.1)


@pytest.mark.parametrize("cache", ["device", "disk", "auto"])
def test_every_cache_holds_the_same(setting: Callable[..., Setting], cache: str, tmp_path: Path) -> None:
    host, other = setting(cache="host"), setting(cache=cache, cache_dir=str(tmp_path))
    for i in range(2):
        for s in (host, other):
            s.advance(i)
        for name in ("x", "y", "x_tilde"):
            assert torch.equal(getattr(host.streams, name), getattr(other.streams, name)), name


def test_files_hold_the_streams_without_a_name(setting: Callable[..., Setting], tmp_path: Path) -> None:
    """Nothing is left behind however the process ends, and everything is gone when they are closed."""

    def mapped() -> list[str]:
        return [line.rstrip() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]

    s, host = setting(cache="disk", cache_dir=str(tmp_path)), setting(cache="host")
    assert len(mapped()) == 3
    assert all(line.endswith(" (deleted)") and " rw-s " in line for line in mapped())
    assert list(tmp_path.iterdir()) == []
    s.advance(0)
    host.advance(0)
    assert torch.equal(s.streams.x_tilde, host.streams.x_tilde)
    assert torch.equal(s.streams.x, host.streams.x)
    s.streams.close()
    assert mapped() == []
    assert not hasattr(s.streams, "x")
    s.streams.close()  # twice does no harm


def test_other_caches_write_nothing(setting: Callable[..., Setting], tmp_path: Path) -> None:
    setting(cache="host", cache_dir=str(tmp_path)).advance(0)
    assert list(tmp_path.iterdir()) == []


def test_auto_is_the_host_without_a_gpu() -> None:
    assert Streams(windows(), 0, CPU, StreamOptions())._choose(1) == "host"


def test_streams_are_float32_and_detached(make_model: Callable[..., PreTrainedModel]) -> None:
    teacher, student = make_model("llama").bfloat16(), make_model("llama", seed=1).bfloat16()
    s = Streams(windows(), 0, CPU, StreamOptions())
    s.start((teacher, find_blocks(teacher)), (student, find_blocks(student)))
    assert s.x.dtype == s.x_tilde.dtype == s.y.dtype == torch.float32
    assert not s.x.requires_grad


def test_batches_cover_the_windows_once() -> None:
    s = Streams(windows(), HELD_OUT, CPU, StreamOptions(batch_windows=2))
    assert [(b.start, b.stop) for b in s.batches()] == [(0, 2), (2, 4), (4, 5)]
    assert s.train == 3
    assert [(b.start, b.stop) for b in s.batches(s.train)] == [(0, 2), (2, 3)]


@pytest.mark.parametrize("rows", [slice(0, 3), slice(3, 5), slice(1, 4)])
def test_block_error_sums_over_the_rows_asked_for(setting: Callable[..., Setting], rows: slice) -> None:
    s = setting(batch_windows=2)
    s.streams.compute_targets(s.blocks[0][0], s.calls[0])
    sums = s.streams.block_error(s.blocks[1][0], s.calls[0], rows, token_error_sums)
    x_tilde, y = states(s.student)[1][rows], states(s.teacher)[1][rows]
    torch.testing.assert_close(sums.float(), torch.stack(token_error_sums(x_tilde, y)), rtol=1e-4, atol=1e-4)
    assert sums.dtype == torch.float64
    same = s.streams.block_error(s.blocks[0][0], s.calls[0], slice(0, 0), token_error_sums)
    assert same.tolist() == [0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_output_that_is_not_finite_is_refused(setting: Callable[..., Setting], bad: float) -> None:
    s = setting()
    s.streams.compute_targets(s.blocks[0][0], s.calls[0])
    with torch.no_grad():
        s.blocks[1][0].mlp.down_proj.weight[0, 0] = bad
    with pytest.raises(LitBinqError, match="a quantized block put out NaN or inf") as caught:
        s.streams.advance(s.blocks[1][0], s.calls[0])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": "ram"}, r"streams\.cache: got 'ram', expected one of auto, device, host, disk"),
        ({"batch_windows": 0}, r"streams\.batch_windows: got 0"),
        ({"cache": "disk", "cache_dir": "no/such/folder"}, r"streams\.cache_dir: got 'no/such/folder'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LitBinqError, match=message):
        StreamOptions(**options)
