"""Random layers of all formats but row x column, their definition in numpy, and one-node models of them.

Legend: y = x W^T + bias, x (M, K), W (N, K) decoded here by numpy from the stored bits.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lit_binq_onnx.functions import BODIES
from native import BLOCK, largest_error


@dataclass
class Packed:
    """One layer: its operator, its tensors in the order of the inputs, and what they stand for."""

    op: str
    tensors: dict[str, np.ndarray]
    attributes: dict[str, int]
    W: np.ndarray  # (N, K) float64
    bias: np.ndarray | None
    # (mask (K,), size (N, K)) for every product that is rounded to tables: which columns, and the largest factors
    products: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    group: int = 1 << 30

    def reference(self, x: np.ndarray) -> np.ndarray:
        y = x.astype(np.float64) @ self.W.T
        return y if self.bias is None else y + self.bias

    def magnitude(self, x: np.ndarray) -> np.ndarray:
        """(M, N): sum of the magnitudes of everything that is added up, at the size of the largest factor."""
        sizes = [size * mask for mask, size in self.products] or [np.abs(self.W)]
        y = np.abs(x.astype(np.float64)) @ sum(sizes).T
        return y if self.bias is None else y + np.abs(self.bias)

    def lut_bound(self, x: np.ndarray, isa: str) -> np.ndarray:
        """(M, N): what rounding the tables can cost, block by block."""
        total = np.zeros((len(x), len(self.W)))
        K = self.W.shape[1]
        for mask, size in self.products:
            for start in range(0, K, self.group):
                for first in range(start, min(K, start + self.group), BLOCK):
                    last = min(K, start + self.group, first + BLOCK)
                    z = np.abs(x[:, first:last].astype(np.float64)) * mask[first:last]
                    z = np.pad(z, ((0, 0), (0, -(last - first) % 8)))
                    total += np.outer(largest_error(z, isa), size[:, first])
        return total


def random_bits(rng: np.random.Generator, N: int, K: int) -> tuple[np.ndarray, np.ndarray]:
    """Bits (N, K) and their bytes; padding bits are random too, they must not count."""
    every = rng.integers(0, 2, (N, -(-K // 8) * 8), dtype=np.uint8)
    return every[:, :K], np.packbits(every, axis=1, bitorder="little")


def random_half(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Of both signs, with some zeros and subnormals."""
    values = rng.standard_normal(shape)
    values[rng.random(shape) < 0.05] = 0
    values[rng.random(shape) < 0.05] = 3e-7
    return values.astype(np.float16)


def grouped(N: int, K: int, group: int, *, bias: bool = True, seed: int = 0) -> Packed:
    rng = np.random.default_rng(seed)
    bits, codes = random_bits(rng, N, K)
    scales = random_half(rng, (N, -(-K // group)))
    s = np.repeat(scales.astype(np.float64), group, axis=1)[:, :K]
    return Packed(
        "GroupedBinaryMatMul",
        {"codes": codes, "scales": scales},
        {"K": K, "group": group},
        s * (2.0 * bits - 1),
        rng.standard_normal(N).astype(np.float32) if bias else None,
        [(np.ones(K), np.abs(s))],
        group,
    )


def levels(N: int, K: int, group: int, zones: int = 1, *, bias: bool = True, seed: int = 0) -> Packed:
    rng = np.random.default_rng(seed)
    (A, codes), (S, selector), (z, column_bits) = (random_bits(rng, n, K) for n in (N, N, 1))
    table = random_half(rng, (N, zones * -(-K // group), 4))
    place = zones * (np.arange(K) // group) + (z[0] if zones == 2 else 0)
    L = table.astype(np.float64)[:, place]  # (N, K, 4)
    W = np.take_along_axis(L, (A + 2 * S).astype(np.int64)[:, :, None], 2)[:, :, 0]
    signs = np.array([[1, -1, -1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, 1, 1, 1]])
    size = (np.abs(table.astype(np.float64) @ signs.T) / 4).sum(-1)  # (N, G)
    masks = [z[0] == i for i in range(2)] if zones == 2 else [np.ones(K, bool)]
    spread = [np.repeat(size[:, i::zones], group, axis=1)[:, :K] for i in range(zones)]
    return Packed(
        "LevelsMatMul",
        {
            "codes": codes,
            "selector": selector,
            "levels": table,
            "column_bits": column_bits[0] if zones == 2 else np.zeros(0, np.uint8),
        },
        {"K": K, "group": group, "zones": zones},
        W,
        rng.standard_normal(N).astype(np.float32) if bias else None,
        [(m.astype(float), s) for m, s in zip(masks, spread, strict=True)],
        group,
    )


def sparse8(N: int, K: int, share: float = 0.1, *, bias: bool = True, seed: int = 0) -> Packed:
    rng = np.random.default_rng(seed)
    bits, codes = random_bits(rng, N, K)
    chosen = rng.random((N, K)) < share
    values = rng.integers(-128, 128, int(chosen.sum())).astype(np.int8)
    r, s = random_half(rng, (N,)), random_half(rng, (N,))
    Q = np.zeros((N, K))
    Q[chosen] = values
    W = np.where(chosen, s.astype(np.float64)[:, None] * Q, r.astype(np.float64)[:, None] * (2.0 * bits - 1))
    mask = np.packbits(chosen, axis=1, bitorder="little")
    return Packed(
        "Sparse8MatMul",
        {"codes": codes, "mask": mask, "values": values, "row_scale": r, "value_scale": s},
        {"K": K},
        W,
        rng.standard_normal(N).astype(np.float32) if bias else None,
    )


MAKERS: dict[str, Callable[..., Packed]] = {
    "grouped": lambda N, K, **more: grouped(N, K, 32, **more),
    "levels": lambda N, K, **more: levels(N, K, 32, **more),
    "levels, two zones": lambda N, K, **more: levels(N, K, 32, 2, **more),
    "sparse8": sparse8,
}


def one_node(p: Packed, *, exact: int | None = None, body: bool = False, rank: int = 2) -> onnx.ModelProto:
    """X -> the operator -> Y, everything else constant."""
    tensors = p.tensors if p.bias is None else {**p.tensors, "bias": p.bias}
    attributes = p.attributes if exact is None else {**p.attributes, "exact": exact}
    shape = [*(f"d{i}" for i in range(rank - 1)), p.W.shape[1]]
    graph = helper.make_graph(
        [helper.make_node(p.op, ["X", *tensors], ["Y"], "layer", domain="lit_binq", **attributes)],
        "one_node",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("lit_binq", 1)],
        functions=[BODIES[p.op]()] if body else [],
        ir_version=10,
    )


def activations(M: int, K: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((M, K)).astype(np.float32)
