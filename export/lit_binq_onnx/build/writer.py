"""Writing a graph node by node, and the nodes of every packed linear. Knows ONNX and the packed layers.

Legend: x (..., K) input of a linear, y (..., N) its output.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from lit_binq.formats import OPERATORS, PackedLinear, Product
from lit_binq_onnx.build.head import MICROSOFT
from lit_binq_onnx.build.tensors import DataFile
from lit_binq_onnx.functions import DOMAIN, OPSET, VERSION, add_functions

IR_VERSION = 10
"""What ONNX Runtime 1.18 can read."""


def one_operator(layers: Sequence[PackedLinear], *, biases: bool) -> bool:
    """Whether linears can be one operator: each a single BinaryMatMul, and without biases where none may be."""
    kinds = [[product.operator for product in layer.products()] for layer in layers]
    return all(kind == ["BinaryMatMul"] for kind in kinds) and (biases or all(m.bias is None for m in layers))


class NormedRows(NamedTuple):
    """What products behind a norm are taken of: hidden + skip, normalized.

    Attributes:
        hidden: name of a value (..., K).
        skip: name of one of the same shape; "" where nothing is added.
        gamma: name of an initializer (K,) float32.
        epsilon: of the norm.
    """

    hidden: str
    skip: str
    gamma: str
    epsilon: float


class GraphWriter:
    """A graph that grows at its end.

    Args:
        data: where its tensors go.

    Attributes:
        nodes: so far.
    """

    def __init__(self, data: DataFile) -> None:
        self.data = data
        self.nodes: list[NodeProto] = []
        self._stored: dict[str, TensorProto] = {}

    def stored(self, name: str, array: np.ndarray) -> str:
        """An initializer of this name; a second one of the name is the first."""
        if name not in self._stored:
            self._stored[name] = self.data.proto(name, array)
        return name

    def add(self, kind: str, inputs: list[str], output: str, *, domain: str = "", **attributes: Any) -> str:
        """A node with one output, whose name is returned."""
        return self.add_many(kind, inputs, [output], domain=domain, **attributes)[0]

    def add_many(
        self, kind: str, inputs: list[str], outputs: list[str], *, domain: str = "", **attributes: Any
    ) -> list[str]:
        """A node with several outputs; "" leaves one out."""
        name = next(o for o in outputs if o)
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=f"{name}/node", domain=domain, **attributes))
        return outputs

    def linear(self, layer: PackedLinear, x: str, name: str) -> str:
        """A packed linear as its format computes it: one operator of our domain for each of its products.

        Args:
            layer: any format.
            x: name of the input.
            name: the module's name, for its tensors and its output.
        """
        y, products = "", layer.products()
        for i, product in enumerate(products):
            label = name if len(products) == 1 else f"{name}.{i}"
            read = y if product.chained and y else x
            if product.columns is not None:
                columns = self.stored(f"{label}.columns", product.columns.numpy().astype(np.int64))
                read = self.add("Gather", [read, columns], f"{label}.chosen", axis=-1)
            inputs, numbers = self._inputs(product, label), product.attributes()
            term = self.add(product.operator, [read, *inputs], label, domain=DOMAIN, **numbers)
            y = term if product.chained or not y else self.add("Add", [y, term], f"{label}.sum")
        return y

    def _inputs(self, product: Product, name: str) -> list[str]:
        """Initializers of what a product reads."""
        labels = [*OPERATORS[product.operator].tensors, "bias"]
        return [
            self.stored(f"{name}.{label}", tensor.detach().numpy())
            for label, tensor in zip(labels, product.operands(), strict=False)  # the bias may be absent
        ]

    def qkv(self, layers: Sequence[PackedLinear], rows: NormedRows, names: Sequence[str], name: str) -> tuple[str, str]:
        """q, k and v behind their norm as one operator; `one_operator` says where that can be.

        Args:
            layers: q, k, v.
            rows: what they are taken of.
            names: the modules' names, for their tensors.
            name: of the output.

        Returns:
            Names of the three outputs beside each other, and of hidden + skip.
        """
        tensors, biases = self._operands(layers, names)
        return self._behind_norm("NormBinaryMatMulQKV", rows, [*tensors, *biases], name, K=layers[0].in_features)

    def gated_mlp(
        self, layers: Sequence[PackedLinear], rows: NormedRows, names: Sequence[str], name: str
    ) -> tuple[str, str]:
        """down(silu(gate) * up) behind its norm; see `qkv`, with layers gate, up, down, none with a bias."""
        tensors, _ = self._operands(layers, names)
        gate = layers[0]
        return self._behind_norm("NormBinaryGatedMLP", rows, tensors, name, K=gate.in_features, H=gate.out_features)

    def _behind_norm(self, kind: str, rows: NormedRows, inputs: list[str], name: str, **sizes: int) -> tuple[str, str]:
        skip = rows.skip or self.stored("no skip", np.zeros(sizes["K"], np.float32))
        inputs = [rows.hidden, skip, rows.gamma, *inputs]
        y, total = self.add_many(kind, inputs, [name, f"{name}.sum"], domain=DOMAIN, epsilon=rows.epsilon, **sizes)
        return y, total

    def _operands(self, layers: Sequence[PackedLinear], names: Sequence[str]) -> tuple[list[str], list[str]]:
        """Initializers of layers of one BinaryMatMul each: tensors of all, then biases of all, or
        of none where there is none.

        One that is missing among others is zeros: ONNX Runtime 1.18 crashes at a custom operator that lacks an input
        other than the last.
        """
        tensors: list[str] = []
        biases: list[str] = []
        biased = any(layer.bias is not None for layer in layers)
        for layer, name in zip(layers, names, strict=True):
            (product,) = layer.products()
            inputs = self._inputs(product, name)
            tensors += inputs[:3]
            if biased:
                biases.append(*inputs[3:] or [self.stored(f"{name}.bias", np.zeros(layer.out_features, np.float32))])
        return tensors, biases

    def model(self, inputs: list[ValueInfoProto], outputs: list[ValueInfoProto]) -> onnx.ModelProto:
        """The finished model, function bodies of our operators included."""
        graph = helper.make_graph(self.nodes, "lit_binq", inputs, outputs, list(self._stored.values()))
        imports = [helper.make_opsetid(d, v) for d, v in (("", OPSET), (MICROSOFT, 1), (DOMAIN, VERSION))]
        model = helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION, producer_name="lit_binq")
        add_functions(model)
        return model
