"""Two-plane layers in ONNX: the body against torch, exported models on both routes, generation."""

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel

from exporting import random_model
from lit_binq.errors import LitBinqError
from lit_binq.formats import InputFormat, PackedLinear, TwoPlane, two_plane_matmul
from lit_binq.formats.registry import packed_linears
from lit_binq.hub.save_load import save_packed
from lit_binq_onnx.build.check import check_onnx
from lit_binq_onnx.build.export import export_onnx
from lit_binq_onnx.functions import add_functions
from lit_binq_onnx.runtime.generate import generate
from lit_binq_onnx.runtime.session import MODEL, OnnxModel, positions, read_facts
from native import LEVELS, require_native, session
from two_plane_problems import Problem, activations, model, problem

IDS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))
INPUTS = [(0, 0, False), (0, 8, False), (4, 0, False), (4, 16, False), (4, 16, True), (8, 0, False), (8, 8, True)]
"""(activation_bits, outliers, static)."""


def torch_product(p: Problem, x: np.ndarray) -> np.ndarray:
    tensors = {name: torch.from_numpy(t) for name, t in p.tensors().items()}
    bias = tensors.pop("bias", None)
    numbers = (p.K, p.group, p.bits, len(p.outliers))
    return two_plane_matmul(torch.from_numpy(x), *tensors.values(), bias, *numbers).numpy()


def body_product(
    p: Problem, x: np.ndarray, level: ort.GraphOptimizationLevel | None = None, config: dict[str, str] | None = None
) -> np.ndarray:
    """Without the library."""
    proto = model(p, [*x.shape])
    add_functions(proto)
    onnx.checker.check_model(proto, full_check=True)
    y: np.ndarray = session(proto, None, level=level, config=config).run(None, {"X": x})[0]
    return y


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(np.abs(want).max(initial=0)))


@pytest.mark.parametrize("L", [2, 3, 4])
@pytest.mark.parametrize(("bits", "outliers", "static"), INPUTS)
@pytest.mark.parametrize("bias", [False, True])
def test_the_body_equals_torch(L: int, bits: int, outliers: int, static: bool, bias: bool) -> None:
    p = problem(19, 77, L=L, group=24, bits=bits, outliers=outliers, static=static, bias=bias)
    x = activations(6, 77).reshape(2, 3, 77)
    want = torch_product(p, x)
    reference = p.reference(x.reshape(6, 77)).reshape(2, 3, 19)
    np.testing.assert_allclose(want, reference, atol=1e-5 * np.abs(reference).max())
    assert_close(body_product(p, x), want)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("config", [{}, {"session.disable_aot_function_inlining": "1"}])
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_the_body_at_every_optimization_level(
    level: ort.GraphOptimizationLevel, config: dict[str, str], bits: int
) -> None:
    p, x = problem(19, 77, L=3, group=24, bits=bits, outliers=16), activations(5, 77)
    assert_close(body_product(p, x, level, config), torch_product(p, x))


@pytest.mark.parametrize("shape", [(77,), (0, 77), (2, 0, 77)])
def test_the_body_takes_all_shapes(shape: tuple[int, ...]) -> None:
    p = problem(19, 77, L=4, group=24, bits=4)
    x = activations(1, 77)[0] if len(shape) == 1 else np.zeros(shape, np.float32)
    y = body_product(p, x)
    assert y.shape == (*shape[:-1], 19)
    if len(shape) == 1:
        assert_close(y, torch_product(p, x))


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 1 << 20), scales=st.lists(st.floats(-0.5, 1.0, width=16), min_size=5, max_size=5))
def test_the_body_takes_any_scales(seed: int, scales: list[float]) -> None:
    """Equal levels and levels in any order: a code off by one is an error of the size of R."""
    p, x = problem(5, 24, group=8, bits=4, outliers=8, seed=seed), activations(4, 24, seed)
    p.scales = np.array(scales, np.float16)
    assert_close(body_product(p, x), torch_product(p, x))


def test_rows_of_equal_values() -> None:
    """R = 0: the value itself, whatever the scales."""
    for bits in (4, 8):
        p = problem(7, 32, group=16, bits=bits)
        x = np.full((2, 32), 1.5, np.float32)
        x[1] = 0
        assert_close(body_product(p, x), torch_product(p, x))


# --- exported models


def two_plane_layer(linear: nn.Linear, i: int, g: torch.Generator) -> PackedLinear:
    """Four random levels of the weight's size; the i-th layer takes the i-th kind of input and number of levels."""
    N, K = linear.weight.shape
    bits, outliers, static = INPUTS[i % len(INPUTS)]
    L, group = 2 + i % 3, 16
    size = linear.weight.detach().abs().mean()
    levels = size * torch.randn(N, -(-K // group), L, generator=g)
    columns = torch.randperm(K, generator=g)[:outliers].sort().values
    scales = torch.tensor([0.02, 0.07, 0.13, 0.25, 0.5]) if bits == 4 else None
    fixed = torch.tensor([-4.0, 8.0, -5.0, 10.0]) if static else None
    codes = torch.randint(4, (N, K), generator=g).to(torch.uint8)
    return TwoPlane(levels, codes, group, InputFormat(bits, columns, scales, fixed)).pack(linear.bias)


def packed(kind: str) -> PreTrainedModel:
    """A tiny model with every linear of its blocks replaced."""
    made = random_model(kind)
    g = torch.Generator().manual_seed(5)
    linears = [(n, m) for n, m in made.named_modules() if isinstance(m, nn.Linear) and "layers." in n]
    for i, (name, linear) in enumerate(linears):
        made.set_submodule(name, two_plane_layer(linear, i, g))
    return made


@pytest.fixture(scope="module", params=["llama", "opt"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """A model and its folder; OPT has biases, LLaMA none."""
    place = tmp_path_factory.mktemp("two_plane")
    packed_folder, folder = place / "packed", place / "onnx"
    made = packed(request.param)
    save_packed(made, byte_tokenizer(), packed_folder, facts={})
    export_onnx(made, byte_tokenizer(), folder, packed=packed_folder, check=False)
    return made, folder


def logits(opened: OnnxModel) -> np.ndarray:
    mask = np.ones(IDS.shape, np.int64)
    return opened.forward(IDS.numpy(), mask, positions(mask), opened.empty_past(len(IDS)))[0]


def close_enough(got: np.ndarray, want: np.ndarray) -> None:
    """1e-4 of the largest logit, but for rounding an activation the other way: a tie that float32 decides differently
    moves one value by one step of 16, so a hundredth of the logits may differ by more, and none by much."""
    error = np.abs(got - want) / np.abs(want).max()
    assert np.quantile(error, 0.99) < 1e-4
    assert error.max() < 0.05


def test_stock_runtime_equals_torch(exported: tuple[PreTrainedModel, Path]) -> None:
    made, folder = exported
    with torch.no_grad():
        want = made(input_ids=IDS).logits.numpy()
    assert np.abs(want).max() > 0.1
    close_enough(logits(OnnxModel(folder, native=False)), want)


def test_native_operators_equal_torch(exported: tuple[PreTrainedModel, Path]) -> None:
    library = require_native()
    made, folder = exported
    with torch.no_grad():
        want = made(input_ids=IDS).logits.numpy()
    layers = len(packed_linears(made))
    proto = onnx.load(folder / MODEL)
    assert sum(n.op_type == "TwoPlaneMatMul" for n in proto.graph.node) == layers
    assert read_facts(folder)["packed_nodes"] == layers
    for mode in ("exact", "lut"):
        opened = OnnxModel(folder, native=True, mode=mode, threads=1)
        before = library.calls()
        got = logits(opened)
        assert library.calls() - before == layers
        if mode == "exact":
            close_enough(got, want)
        else:
            error = np.abs(got - want).max() / np.abs(want).max()
            assert 1e-3 < error < 0.3  # the tables were used


def test_generation(exported: tuple[PreTrainedModel, Path]) -> None:
    """Both routes write the tokens that torch would."""
    require_native()
    made, folder = exported
    ids = byte_tokenizer()("The cat")["input_ids"]
    want = list(ids)
    with torch.no_grad():
        for _ in range(8):
            want.append(int(made(input_ids=torch.tensor([want])).logits[0, -1].argmax()))
    for native in (False, True):
        opened = OnnxModel(folder, native=native, mode="exact", threads=1)
        written = generate(opened, byte_tokenizer(), "The cat", 8)
        assert "".join(written)
        assert written.token_ids == want[len(ids) :]


def test_the_check_allows_rounding_and_nothing_else(exported: tuple[PreTrainedModel, Path]) -> None:
    """Rounded inputs are judged by how far torch is from itself; a model with other codes is still found out."""
    made, folder = exported
    report = check_onnx(folder, made, byte_tokenizer())
    assert all(case.passed for case in report.cases)
    other = copy.deepcopy(made)
    for layer in packed_linears(other).values():
        layer.get_buffer("codes").bitwise_not_()
    with pytest.raises(LitBinqError, match=r"differs from torch: .* expected rms <= 0\.\d"):
        check_onnx(folder, other, byte_tokenizer())
