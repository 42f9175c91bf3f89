"""The operator NBitsMatMul inside ONNX Runtime: shapes, modes, threads, errors, and its function body.

Legend: as in `nbits_problems`.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime as ort
import pytest

from lit_binq_onnx.functions import add_functions
from lit_binq_onnx.runtime.library import Mode
from native import KernelLibrary, instruction_sets, require_kernels, session
from nbits_problems import activations, multiply, one_node_model, problem

MODES: tuple[Mode, ...] = ("lut", "exact")

INT8_ERROR = 0.05
"""Relative error of a product whose activations, of many octaves, are rounded to int8 by the block: 0.028 is seen."""


@pytest.fixture(scope="module")
def native() -> KernelLibrary:
    return require_kernels()


@pytest.mark.parametrize("shape", [(70,), (1, 70), (3, 70), (17, 70), (2, 3, 70), (0, 70), (2, 0, 70)])
@pytest.mark.parametrize("exact", [-1, 0, 1])
@pytest.mark.parametrize("bits", [4, 8])
def test_any_rank(native: KernelLibrary, shape: tuple[int, ...], exact: int, bits: int) -> None:
    p, x = problem(19, 70, bits=bits, zeros=exact != 0), activations(1, 70 * int(np.prod(shape[:-1]))).reshape(shape)
    before = native.calls()
    y = session(one_node_model(p, [*shape], exact=exact), native).run(None, {"X": x})[0]
    assert native.calls() == before + 1
    assert y.shape == (*shape[:-1], 19)
    want, _ = multiply(native, p, x.reshape(-1, 70), exact=exact == 1, isa=native.isa())
    np.testing.assert_array_equal(y.reshape(-1, 19), want)


def test_dimensions_keep_their_names(native: KernelLibrary) -> None:
    p = problem(24, 64)
    s = session(one_node_model(p, ["batch", "sequence", 64]), native)
    assert s.get_outputs()[0].shape == ["batch", "sequence", 24]


def test_modes_and_sets_can_be_forced(native: KernelLibrary) -> None:
    p, x = problem(19, 70), activations(3, 70)
    for isa in instruction_sets(native):
        for mode in MODES:
            s = session(one_node_model(p, [3, 70], exact=int(mode == "lut")), native.on(isa), mode=mode)
            want, _ = multiply(native, p, x, exact=mode == "exact", isa=isa)
            np.testing.assert_array_equal(s.run(None, {"X": x})[0], want)


def test_flat_scales_and_zeros(native: KernelLibrary) -> None:
    for bits in (4, 8):
        p, x = problem(19, 70, bits=bits), activations(3, 70)
        results = [
            session(one_node_model(p, [3, 70], flat=flat), native).run(None, {"X": x})[0] for flat in (False, True)
        ]
        np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("M", [1, 40])
def test_threads_change_nothing(native: KernelLibrary, M: int) -> None:
    p, x = problem(3000, 300), activations(M, 300)
    one, two = (session(one_node_model(p, ["M", 300]), native, threads=t) for t in (1, 2))
    want = one.run(None, {"X": x})[0]
    np.testing.assert_array_equal(two.run(None, {"X": x})[0], want)
    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda _: two.run(None, {"X": x})[0], range(8)):
            np.testing.assert_array_equal(y, want)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("g", [16, 32, 128])
@pytest.mark.parametrize("native_too", [False, True])
def test_the_body_computes_the_same(bits: int, zeros: bool, g: int, native_too: bool) -> None:
    """Within the rounding of activations, with a tail too; sessions with the library ignore the body."""
    library = require_kernels() if native_too else None
    for K in (128, 2 * g + 16):
        p, x = problem(33, K, bits=bits, g=g, zeros=zeros), activations(3, K)
        model = one_node_model(p, ["M", K], body=True)
        before = library.calls() if library else 0
        if bits == 8 and library is None and ort.__version__.startswith("1.18."):
            pytest.skip("ONNX Runtime 1.18 has MatMulNBits of 4 bits only")
        y = session(model, library).run(None, {"X": x})[0]
        want = p.reference(x)
        assert np.linalg.norm(y - want) < INT8_ERROR * np.linalg.norm(want)
        assert library is None or library.calls() == before + 1


@pytest.mark.parametrize(
    "level", [ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL]
)
@pytest.mark.parametrize("config", [{}, {"session.disable_aot_function_inlining": "1"}])
def test_the_body_is_taken_either_way(level: ort.GraphOptimizationLevel, config: dict[str, str]) -> None:
    p, x = problem(33, 64), activations(3, 64)
    y = session(one_node_model(p, ["M", 64], body=True, exact=1), None, level=level, config=config).run(None, {"X": x})
    assert np.linalg.norm(y[0] - p.reference(x)) < INT8_ERROR * np.linalg.norm(p.reference(x))


def test_the_body_brings_its_domain() -> None:
    model = one_node_model(problem(16, 32), ["M", 32])
    for _ in range(2):
        add_functions(model)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18), ("lit_binq", 1), ("com.microsoft", 1)]
    assert [f.name for f in model.functions] == ["NBitsMatMul"]


EMPTY = np.zeros((0, 2, 16), np.uint8)


def test_no_rows_of_weights(native: KernelLibrary) -> None:
    p = problem(1, 64)
    tensors = {"codes": EMPTY, "scales": np.zeros((0, 2), np.float32), "zero_points": np.zeros((0, 1), np.uint8)}
    with pytest.raises(Exception, match="attribute N is 0, expected at least 1"):
        session(one_node_model(p, [2, 64], tensors=tensors, N=0), native)


@pytest.mark.parametrize(
    ("attributes", "tensors", "message"),
    [
        ({"K": -1}, {}, "attribute K is missing, expected the number of columns"),
        ({"N": -1}, {}, "attribute N is missing, expected the number of rows"),
        ({"bits": -1}, {}, "attribute bits is missing, expected 4 or 8"),
        ({"block_size": -1}, {}, "attribute block_size is missing, expected the columns that share a scale"),
        ({"bits": 2}, {}, "attribute bits is 2, expected 4 or 8"),
        ({"block_size": 48}, {}, "attribute block_size is 48, expected 16, 32, 64, 128 or 256"),
        ({"block_size": 512}, {}, "attribute block_size is 512, expected 16"),
        ({"exact": 2}, {}, "attribute exact is 2, expected 0 or 1"),
        ({"K": 65}, {}, "codes has shape (18, 2, 16), expected (18, 3, 16) for 18 rows and 65 columns in blocks of 32"),
        ({"N": 17}, {}, "codes has shape (18, 2, 16), expected (17, 2, 16)"),
        ({"bits": 8}, {}, "codes has shape (18, 2, 16), expected (18, 2, 32)"),
        ({}, {"scales": np.ones((18, 3), np.float32)}, "scales has shape (18, 3), expected (18, 2) or (36,)"),
        ({}, {"scales": np.ones(35, np.float32)}, "scales has shape (35,), expected (18, 2) or (36,)"),
        ({}, {"zero_points": np.ones((18, 2), np.uint8)}, "zero_points has shape (18, 2), expected (18, 1) or (18,)"),
        ({}, {"scales": np.where(np.arange(36) == 5, np.inf, 1).astype(np.float32)}, "scales[2, 1] is not finite"),
    ],
)
def test_errors_in_one_line(
    native: KernelLibrary, attributes: dict[str, int], tensors: dict[str, np.ndarray], message: str
) -> None:
    model = one_node_model(problem(18, 64), ["M", "K"], tensors=tensors, **attributes)
    with pytest.raises(Exception, match=r"lit_binq\.NBitsMatMul: ") as caught:
        session(model, native)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["codes", "scales"])
def test_weights_must_be_constant(native: KernelLibrary, name: str) -> None:
    with pytest.raises(Exception, match=f"lit_binq.NBitsMatMul: {name} is computed at run time"):
        session(one_node_model(problem(18, 64), [2, 64], computed=(name,)), native)


def test_zero_points_must_be_constant(native: KernelLibrary) -> None:
    """Seen when it runs only: until then they look as if they were left out."""
    p = problem(18, 64)
    s = session(one_node_model(p, [2, 64], computed=("zero_points",)), native)
    with pytest.raises(Exception, match=r"lit_binq\.NBitsMatMul: zero_points is computed at run time"):
        s.run(None, {"X": activations(2, 64), "zero_points": p.zeros})


def test_wrong_x(native: KernelLibrary) -> None:
    s = session(one_node_model(problem(18, 64), None), native)
    with pytest.raises(Exception, match=r"X has shape \(2, 63\), expected \(..., 64\) as attribute K says"):
        s.run(None, {"X": activations(2, 63)})
