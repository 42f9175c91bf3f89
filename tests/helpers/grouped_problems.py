"""Random grouped layers, their definition in numpy, and one-node models of them.

Legend: y = x W^T + bias, x (M, K), W (N, K) decoded here by numpy from the stored bits.
"""

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lit_binq_onnx.functions import BODIES
from native import BLOCK, largest_error


@dataclass
class Grouped:
    """One layer: its tensors in the order of the inputs, its columns and those that share a scale."""

    codes: np.ndarray  # (N, ceil(K / 8)) uint8
    scales: np.ndarray  # (N, ceil(K / group)) float16
    bias: np.ndarray | None  # (N,) float32
    K: int
    group: int

    @property
    def s(self) -> np.ndarray:
        """(N, K) float64: the scale of each weight."""
        return np.repeat(self.scales.astype(np.float64), min(self.group, self.K), axis=1)[:, : self.K]

    @property
    def W(self) -> np.ndarray:
        """(N, K) float64."""
        return self.s * (2.0 * np.unpackbits(self.codes, axis=1, bitorder="little")[:, : self.K] - 1)

    def reference(self, x: np.ndarray) -> np.ndarray:
        y = x.astype(np.float64) @ self.W.T
        return y if self.bias is None else y + self.bias

    def magnitude(self, x: np.ndarray) -> np.ndarray:
        """(M, N): sum of the magnitudes of everything that is added up."""
        y = np.abs(x.astype(np.float64)) @ np.abs(self.W).T
        return y if self.bias is None else y + np.abs(self.bias)

    def lut_bound(self, x: np.ndarray, isa: str) -> np.ndarray:
        """(M, N): what rounding the tables can cost, block by block."""
        size = np.abs(self.s)
        total = np.zeros((len(x), len(size)))
        for start in range(0, self.K, self.group):
            for first in range(start, min(self.K, start + self.group), BLOCK):
                last = min(self.K, start + self.group, first + BLOCK)
                z = np.pad(np.abs(x[:, first:last].astype(np.float64)), ((0, 0), (0, -(last - first) % 8)))
                total += np.outer(largest_error(z, isa), size[:, first])
        return total


def grouped(N: int, K: int, group: int, *, bias: bool = True, seed: int = 0) -> Grouped:
    """Padding bits are random too, they must not count; scales of both signs, with some zeros and subnormals."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2, (N, -(-K // 8) * 8), dtype=np.uint8)
    scales = rng.standard_normal((N, -(-K // group)))
    scales[rng.random(scales.shape) < 0.05] = 0
    scales[rng.random(scales.shape) < 0.05] = 3e-7
    return Grouped(
        np.packbits(bits, axis=1, bitorder="little"),
        scales.astype(np.float16),
        rng.standard_normal(N).astype(np.float32) if bias else None,
        K,
        group,
    )


def one_node(p: Grouped, *, exact: int | None = None, body: bool = False, rank: int = 2) -> onnx.ModelProto:
    """X -> the operator -> Y, everything else constant."""
    tensors = {"codes": p.codes, "scales": p.scales} | ({} if p.bias is None else {"bias": p.bias})
    return model("GroupedBinaryMatMul", tensors, {"K": p.K, "group": p.group}, exact=exact, body=body, rank=rank)


def model(
    op: str,
    tensors: dict[str, np.ndarray],
    attributes: dict[str, int],
    *,
    exact: int | None = None,
    body: bool = False,
    rank: int = 2,
) -> onnx.ModelProto:
    """X -> any operator of constant tensors and an attribute K -> Y."""
    attributes = attributes if exact is None else attributes | {"exact": exact}
    shape = [*(f"d{i}" for i in range(rank - 1)), attributes["K"]]
    graph = helper.make_graph(
        [helper.make_node(op, ["X", *tensors], ["Y"], "layer", domain="lit_binq", **attributes)],
        "one_node",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("lit_binq", 1)],
        functions=[BODIES[op]()] if body else [],
        ir_version=10,
    )


def activations(M: int, K: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((M, K)).astype(np.float32)
