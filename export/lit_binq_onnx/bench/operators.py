"""The candidates of `litbinq bench ops`: each one a layer y = x W^T that ONNX Runtime multiplies by.

    lit-binq-lut, -exact     BinaryMatMul, W = diag(r) B diag(c): 1 bit
    lit-binq-planes          the same and a second one on an eighth of the columns (two BinaryMatMul, Gather, Add)
    lit-binq-grouped         GroupedBinaryMatMul, one scale for 128 columns
    lit-binq-two-plane       TwoPlaneMatMul, two planes: one of four free levels for each row and 128 columns, 2.5 bits
    lit-binq-a4              the same with activations rounded to four binary planes: AND and popcount
    lit-binq-8bit, -4bit     NBitsMatMul, one scale for 32 columns: the tensors of ort-8bit and -4bit
    ort-fp32                 MatMul
    ort-8bit, -4bit, -2bit   MatMulNBits at accuracy_level 4: activations rounded to int8
    ort-2bit-lut             MatMulNBits with the session option `mlas.use_lut_gemm`

Every layer has random weights of its own and knows what they stand for in float64: an error is that of the arithmetic,
not of rounding a model.

Legend: M rows of x, K columns, N rows of W, g block or group.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from lit_binq_onnx.functions import DOMAIN, MICROSOFT, NBITS, OPSET, VERSION
from lit_binq_onnx.runtime.library import Mode

GROUP = 128
"""Columns of a group, of scales or of levels."""

SALIENT = 8
"""The second plane of the planes format here is on every SALIENT-th column."""

NBITS_BLOCK = 32
"""Columns of a scale of NBitsMatMul here: what a rounded head has."""

BLOCKS = (32, 128)
"""Block lengths of MatMulNBits that are tried; where 128 does not divide K, 64 is tried too."""

FLOAT_ERROR = 1e-4
INT8_ERROR = 3e-2
"""Largest relative error with which a candidate is timed: one that computes something else is no candidate. Sums of
float32 err by 1e-6; int8 activations or tables by 5e-3 to 1e-2."""

A4_ERROR = 0.25
"""The same where activations are rounded to 16 levels of their row's range: 0.14 on Gaussian ones with 4096 columns."""

LUT_KEY = "mlas.use_lut_gemm"


@dataclass
class Layer:
    """One weight of one candidate.

    Attributes:
        nodes: from value `x` to value `y`.
        tensors: what is stored, by name.
        dense: gives some rows of W, (n, K) float64.
    """

    nodes: list[NodeProto]
    tensors: dict[str, np.ndarray]
    dense: Callable[[slice], np.ndarray]

    @property
    def stored_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class Kernel:
    """A candidate at one shape.

    Attributes:
        name: as in the table of this file's head.
        make: makes a layer with random weights, given a generator, K, N and the copy's number, which is part of the
            names of its values: `x` is shared, the result is `y{copy}`.
        largest_error: relative; see `INT8_ERROR`.
        mode: of our operators; None: ONNX Runtime's own.
        block: of MatMulNBits and NBitsMatMul; 0: no such thing.
        config: entries of the session's configuration.
        rows: the most rows of x it is timed with; None: any number.
        smallest_error: relative; a smaller one means that the runtime has quietly taken another kernel.
    """

    name: str
    make: Callable[[np.random.Generator, int, int, int], Layer]
    largest_error: float
    mode: Mode | None = None
    block: int = 0
    config: dict[str, str] = field(default_factory=dict)
    rows: int | None = None
    smallest_error: float = 0.0


def _bits(rng: np.random.Generator, N: int, K: int) -> np.ndarray:
    """Random sign bits, (N, ceil(K / 8)) uint8; padding bits are random too, they do not count."""
    width = -(-K // 8)
    return np.frombuffer(rng.bytes(N * width), np.uint8).reshape(N, width)


def _unpacked(codes: np.ndarray, K: int) -> np.ndarray:
    """(N, K) uint8 of 0 and 1."""
    return np.unpackbits(codes, axis=1, count=K, bitorder="little")


def _signs(codes: np.ndarray, K: int) -> np.ndarray:
    """(N, K) float64 of -1 and +1."""
    return 2.0 * _unpacked(codes, K) - 1.0


def _scales(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random float16 scales from 0.5 to 1.5."""
    return (0.5 + rng.random(shape)).astype(np.float16)


def _with_numbers(node: NodeProto, attributes: dict[str, int]) -> NodeProto:
    node.attribute.extend([helper.make_attribute(name, value) for name, value in attributes.items()])
    return node


def _product(op: str, x: str, tensors: dict[str, np.ndarray], y: str, **attributes: int) -> NodeProto:
    return _with_numbers(helper.make_node(op, [x, *tensors], [y], domain=DOMAIN), attributes)


def _row_column(
    rng: np.random.Generator, K: int, N: int, tag: str, x: str, y: str
) -> tuple[NodeProto, dict[str, np.ndarray], Callable[[slice], np.ndarray]]:
    """A BinaryMatMul with random weights: its node, its tensors, and W (N, K)."""
    codes, r, c = _bits(rng, N, K), _scales(rng, N), _scales(rng, K)
    tensors = {f"codes{tag}": codes, f"row_scale{tag}": r, f"col_scale{tag}": c}
    node = _product("BinaryMatMul", x, tensors, y, K=K)
    return node, tensors, lambda n: _signs(codes[n], K) * r[n, None].astype(np.float64) * c.astype(np.float64)


def binary_layer(rng: np.random.Generator, K: int, N: int, copy: int) -> Layer:
    """BinaryMatMul."""
    node, tensors, dense = _row_column(rng, K, N, str(copy), "x", f"y{copy}")
    return Layer([node], tensors, dense)


def planes_layer(rng: np.random.Generator, K: int, N: int, copy: int) -> Layer:
    """Two planes, the second on every SALIENT-th column."""
    columns = np.arange(0, K, SALIENT)
    first, tensors, dense_first = _row_column(rng, K, N, f"{copy}a", "x", f"first{copy}")
    second, more, dense_second = _row_column(rng, len(columns), N, f"{copy}b", f"salient{copy}", f"second{copy}")
    nodes = [
        first,
        helper.make_node("Gather", ["x", f"columns{copy}"], [f"salient{copy}"], axis=1),
        second,
        helper.make_node("Add", [f"first{copy}", f"second{copy}"], [f"y{copy}"]),
    ]

    def dense(n: slice) -> np.ndarray:
        W = dense_first(n)
        W[:, columns] += dense_second(n)
        return W

    return Layer(nodes, {**tensors, **more, f"columns{copy}": columns}, dense)


def grouped_layer(rng: np.random.Generator, K: int, N: int, copy: int) -> Layer:
    """GroupedBinaryMatMul."""
    codes, scales = _bits(rng, N, K), _scales(rng, N, -(-K // GROUP))
    tensors = {f"codes{copy}": codes, f"scales{copy}": scales}
    node = _product("GroupedBinaryMatMul", "x", tensors, f"y{copy}", K=K, group=GROUP)
    return Layer(
        [node], tensors, lambda n: _signs(codes[n], K) * np.repeat(scales[n].astype(np.float64), GROUP, 1)[:, :K]
    )


def _chosen(codes: np.ndarray, selector: np.ndarray, levels: np.ndarray, K: int) -> np.ndarray:
    """(n, K) float64: of the four `levels` (n, groups, 4) of a row's group, the one that two bits pick."""
    places = 4 * (np.arange(K) // GROUP) + _unpacked(codes, K) + 2 * _unpacked(selector, K)
    W: np.ndarray = np.take_along_axis(levels.reshape(len(levels), -1).astype(np.float64), places, axis=1)
    return W


def two_plane_maker(activation_bits: int) -> Callable[[np.random.Generator, int, int, int], Layer]:
    """Makes layers of TwoPlaneMatMul with four free levels for each row and group, the dearest of its forms."""

    def make(rng: np.random.Generator, K: int, N: int, copy: int) -> Layer:
        codes, selector = _bits(rng, N, K), _bits(rng, N, K)
        levels = rng.standard_normal((N, -(-K // GROUP), 4)).astype(np.float16)
        scales = (np.array([0, 1, 2, 4, 8]) / 15).astype(np.float16)
        tensors = {
            f"codes{copy}": codes,
            f"selector{copy}": selector,
            f"levels{copy}": levels,
            f"outliers{copy}": np.zeros(0, np.uint8),
            f"scales{copy}": scales if activation_bits == 4 else np.zeros(0, np.float16),
            f"range{copy}": np.zeros(0, np.float32),
        }
        numbers = {"K": K, "group": GROUP, "activation_bits": activation_bits, "outliers": 0}
        node = _product("TwoPlaneMatMul", "x", tensors, f"y{copy}", **numbers)

        def dense(n: slice) -> np.ndarray:
            return _chosen(codes[n], selector[n], levels[n], K)

        return Layer([node], tensors, dense)

    return make


def float_layer(rng: np.random.Generator, K: int, N: int, copy: int) -> Layer:
    """MatMul, float32; its tensor is (K, N), as torch's exporters and ONNX Runtime want it."""
    W = rng.standard_normal((K, N), np.float32)
    node = helper.make_node("MatMul", ["x", f"w{copy}"], [f"y{copy}"])
    return Layer([node], {f"w{copy}": W}, lambda n: W[:, n].T.astype(np.float64))


def nbits_maker(bits: int, block: int, accuracy: int | None) -> Callable[[np.random.Generator, int, int, int], Layer]:
    """Makes layers of MatMulNBits; codes are unsigned around 2^(bits - 1), a byte holds the first code lowest.

    Without an accuracy level they are layers of our NBitsMatMul, whose scales have the bits of float16.
    """

    def make(rng: np.random.Generator, K: int, N: int, copy: int) -> Layer:
        groups = -(-K // block)
        codes = np.frombuffer(rng.bytes(N * groups * block * bits // 8), np.uint8).reshape(N, groups, -1)
        scales = ((0.5 + rng.random((N, groups))) / 100).astype(np.float32)
        numbers = {"K": K, "N": N, "bits": bits, "block_size": block}
        if accuracy is None:
            scales = scales.astype(np.float16).astype(np.float32)
            kind, domain = NBITS, DOMAIN
        else:
            numbers["accuracy_level"] = accuracy
            kind, domain = "MatMulNBits", MICROSOFT
        node = helper.make_node(kind, ["x", f"q{copy}", f"s{copy}"], [f"y{copy}"], domain=domain)
        _with_numbers(node, numbers)

        def dense(n: slice) -> np.ndarray:
            shifts = np.arange(0, 8, bits, dtype=np.uint8)
            q = (codes[n][..., None] >> shifts) & np.uint8((1 << bits) - 1)  # (n, groups, bytes, codes of a byte)
            s = scales[n].astype(np.float64)
            W = (q.reshape(*s.shape, block) - float(1 << (bits - 1))) * s[:, :, None]
            W_rows: np.ndarray = W.reshape(len(s), -1)[:, :K]
            return W_rows

        # flat scales are what every version of the runtime takes
        return Layer([node], {f"q{copy}": codes, f"s{copy}": scales.reshape(-1)}, dense)

    return make


def nbits_blocks(K: int) -> tuple[int, ...]:
    """Block lengths tried at this width."""
    return BLOCKS if K % 128 == 0 else (32, 64, 128)


def our_kernels() -> list[Kernel]:
    """Candidates that need our library."""
    g = NBITS_BLOCK
    tables = [Kernel(f"lit-binq-{b}bit", nbits_maker(b, g, None), INT8_ERROR, "lut", block=g) for b in (8, 4)]
    return [
        Kernel("lit-binq-lut", binary_layer, INT8_ERROR, "lut"),
        Kernel("lit-binq-exact", binary_layer, FLOAT_ERROR, "exact"),
        Kernel("lit-binq-planes", planes_layer, INT8_ERROR, "lut"),
        Kernel("lit-binq-grouped", grouped_layer, INT8_ERROR, "lut", rows=1),
        Kernel("lit-binq-two-plane", two_plane_maker(0), INT8_ERROR, "lut"),
        Kernel("lit-binq-a4", two_plane_maker(4), A4_ERROR, "lut"),
        *tables,
    ]


def float_kernel() -> Kernel:
    """What all others are compared with."""
    return Kernel("ort-fp32", float_layer, FLOAT_ERROR)


def nbits_kernels(K: int) -> list[list[Kernel]]:
    """ONNX Runtime's low-bit candidates: for each name one candidate a block length."""
    families = [
        [Kernel(f"ort-{b}bit", nbits_maker(b, g, 4), INT8_ERROR, block=g) for g in nbits_blocks(K)] for b in (8, 4, 2)
    ]
    # A runtime without the table kernel ignores the option and multiplies in float32, slowly: the error tells.
    tables = [
        Kernel(
            "ort-2bit-lut",
            nbits_maker(2, g, 0),
            INT8_ERROR,
            block=g,
            config={LUT_KEY: "1"},
            smallest_error=FLOAT_ERROR,
        )
        for g in nbits_blocks(K)
    ]
    return [*families, tables]


def kernel_names(K: int = 1024) -> list[str]:
    """All candidates at a width of `K`, in the order in which they take turns."""
    ours = [kernel.name for kernel in our_kernels()]
    return [float_kernel().name, *(family[0].name for family in nbits_kernels(K)), *ours]


def graph_of(layers: list[Layer], M: int, K: int, N: int) -> onnx.ModelProto:
    """A model in which every layer reads the same x (M, K) and gives an output (M, N) of its own: y0, y1, ..."""
    graph = helper.make_graph(
        [node for layer in layers for node in layer.nodes],
        "bench",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [M, K])],
        [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [M, N]) for i in range(len(layers))],
        [numpy_helper.from_array(value, name) for layer in layers for name, value in layer.tensors.items()],
    )
    domains = {"": OPSET, MICROSOFT: 1, DOMAIN: VERSION}
    opsets = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)
