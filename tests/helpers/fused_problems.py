"""Models of one fused operator, and what their norm and linears give one by one.

Legend: as in native.py; H the rows of gate and up; x the normalized rows of hidden and skip.
"""

import ctypes

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lit_binq_onnx.functions import add_functions
from native import KernelLibrary, Problem, multiply, random_problem, session

EPSILON = 1e-5


def gamma(K: int) -> np.ndarray:
    """(K,) float32, with a zero where there is room for one."""
    made = np.random.default_rng(K).uniform(0.5, 1.5, K).astype(np.float32)
    made[K // 2 : K // 2 + K // 30] = 0
    return made


def skip_for(hidden: np.ndarray) -> np.ndarray:
    """Something of the same shape, for tests that need not know what is added; each row depends on its own only."""
    return np.ascontiguousarray(hidden[..., ::-1]) * np.float32(0.5)


def normalized(
    native: KernelLibrary, hidden: np.ndarray, skip: np.ndarray, weight: np.ndarray, epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
    """(sum, x) of rows (M, K), as the native operators compute them."""
    call, pointer = native.handle.lit_binq_normalize, ctypes.c_void_p
    call.argtypes = [pointer] * 3 + [ctypes.c_float, ctypes.c_int64, ctypes.c_int64] + [pointer] * 2
    arrays = [np.ascontiguousarray(a, np.float32) for a in (hidden, skip, weight)]
    total, x = (np.full(hidden.shape, 12345.0, np.float32) for _ in range(2))
    call(*(a.ctypes.data for a in arrays), epsilon, *hidden.shape, total.ctypes.data, x.ctypes.data)
    return total, x


def rows_of(native: KernelLibrary, hidden: np.ndarray) -> np.ndarray:
    """x (M, K) in the models here."""
    return normalized(native, hidden, skip_for(hidden), gamma(hidden.shape[1]), EPSILON)[1]


def float64_norm(total: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    """x in float64, of a sum in float32."""
    s = total.astype(np.float64)
    x: np.ndarray = s / np.sqrt((s * s).mean(-1, keepdims=True) + np.float64(np.float32(epsilon))) * weight
    return x


def activations(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model(
    kind: str,
    problems: list[Problem],
    x_shape: list[int | str | None] | None,
    *,
    exact: int | None = None,
    inputs: tuple[str, ...] = (),
    body: bool = False,
    one_skip: bool = False,
    **attributes: float,
) -> onnx.ModelProto:
    """hidden, skip -> one fused operator -> Y, sum.

    Tensors named in `inputs` are graph inputs instead of initializers; with `one_skip` skip is (K,).
    """
    suffixes = ("q", "k", "v") if kind == "NormBinaryMatMulQKV" else ("gate", "up", "down")
    tensors: dict[str, np.ndarray | None] = {"gamma": gamma(problems[0].K)}
    for suffix, p in zip(suffixes, problems, strict=True):
        tensors |= {f"codes_{suffix}": p.codes, f"row_scale_{suffix}": p.r, f"col_scale_{suffix}": p.c}
    if kind == "NormBinaryMatMulQKV":
        tensors |= {f"bias_{suffix}": p.bias for suffix, p in zip(suffixes, problems, strict=True)}
    sizes = {"K": problems[0].K} | ({"H": problems[0].N} if kind == "NormBinaryGatedMLP" else {})
    attributes = {**sizes, "epsilon": EPSILON, **attributes}
    attributes |= {} if exact is None else {"exact": exact}
    names = [name if value is not None else "" for name, value in tensors.items()]
    while not names[-1]:
        names.pop()
    given_tensors = {name: value for name, value in tensors.items() if value is not None}
    graph_inputs = [
        helper.make_tensor_value_info("hidden", TensorProto.FLOAT, x_shape),
        helper.make_tensor_value_info("skip", TensorProto.FLOAT, [problems[0].K] if one_skip else x_shape),
    ]
    unknown = None if x_shape is None else [None] * len(x_shape)
    for name in inputs:
        kind_of = helper.np_dtype_to_tensor_dtype(given_tensors[name].dtype)
        graph_inputs.append(helper.make_tensor_value_info(name, kind_of, given_tensors[name].shape))
    graph = helper.make_graph(
        [helper.make_node(kind, ["hidden", "skip", *names], ["Y", "sum"], "fused", domain="lit_binq", **attributes)],
        "one_node",
        graph_inputs,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, unknown) for name in ("Y", "sum")],
        [numpy_helper.from_array(value, name) for name, value in given_tensors.items() if name not in inputs],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("lit_binq", 1)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    if body:
        add_functions(made)
    return made


def attention(sizes: tuple[int, int, int], K: int, *, bias: bool = True, seed: int = 0) -> list[Problem]:
    """q, k and v."""
    return [random_problem(N, K, bias=bias, seed=seed + i) for i, N in enumerate(sizes)]


def mlp(K: int, H: int, N: int, *, seed: int = 0) -> list[Problem]:
    """gate, up and down."""
    shapes = ((H, K), (H, K), (N, H))
    return [random_problem(n, k, bias=False, seed=seed + i) for i, (n, k) in enumerate(shapes)]


def one_by_one(
    native: KernelLibrary, problems: list[Problem], hidden: np.ndarray, *, exact: bool, isa: str
) -> np.ndarray:
    """[Q, K, V] from a norm and three multiplications."""
    x = rows_of(native, hidden)
    return np.concatenate([multiply(native, p, x, exact=exact, isa=isa) for p in problems], axis=1)


def apply_gate(native: KernelLibrary, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """silu(gate) * up as the native operator computes it."""
    call = native.handle.lit_binq_apply_gate
    call.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    opened, up = np.array(gate, np.float32), np.ascontiguousarray(up, np.float32)
    call(native.isa().encode(), opened.ctypes.data, up.ctypes.data, opened.size)
    return opened


def mlp_one_by_one(
    native: KernelLibrary, problems: list[Problem], hidden: np.ndarray, *, exact: bool, isa: str
) -> np.ndarray:
    """A norm, three multiplications and the gate between them."""
    gate, up, down = problems
    x = rows_of(native, hidden)
    opened = apply_gate(
        native.on(isa), multiply(native, gate, x, exact=exact, isa=isa), multiply(native, up, x, exact=exact, isa=isa)
    )
    return multiply(native, down, opened, exact=exact, isa=isa)


def feeds(hidden: np.ndarray) -> dict[str, np.ndarray]:
    return {"hidden": hidden, "skip": skip_for(hidden)}


def run(made: onnx.ModelProto, native: KernelLibrary | None, hidden: np.ndarray, threads: int = 1) -> np.ndarray:
    """Y, after a look at the other output."""
    y, total = session(made, native, threads=threads).run(None, feeds(hidden))
    with np.errstate(over="ignore", invalid="ignore"):
        np.testing.assert_array_equal(total, hidden + skip_for(hidden))
    return y
