"""What diagnostics of a run say, as records, and the file `diagnostics.json` that keeps them.

Legend: W (N, K) full-precision weight, W^ the quantized one; x, x~ a layer's inputs in the full-precision and in the
quantized stream; y, y^ a block's outputs; G the Gram of a window's outputs, each token scaled to unit length.
Norms are Frobenius norms over all measured tokens. Outputs of a linear layer are without its bias.
A number that is not finite, or was not measured, is None (null).

Source of the measures: arXiv 2512.21651; lit_binq.diagnostics.measure says how each is taken.
"""

import dataclasses
import math
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from lit_binq.errors import LitBinqError
from lit_binq.utils.files import read_json, write_json

DIAGNOSTICS = "diagnostics.json"
VERSION = 1


@dataclass
class LinearMeasures:
    """One linear layer; see the file's head for the symbols.

    Attributes:
        weight_error: |W - W^|.
        weight_error_relative: the same over |W|.
        activation_error: |W x~ - W^ x~|, the activation-conditioned (pseudo-target) error.
        activation_error_relative: the same over |W x~|.
        output_error: |W x - W^ x~|, the output (true-target) error.
        output_error_relative: the same over |W x|.
        activation_similarity: mean over tokens of cos(W x~, W^ x~).
        output_similarity: mean over tokens of cos(W x, W^ x~).
        activation_token_error: |G(W^ x~) - G(W x~)|, summed over windows.
        activation_token_error_mean: the same, mean over windows.
        output_token_error: |G(W^ x~) - G(W x)|, summed over windows.
        output_token_error_mean: the same, mean over windows.
    """

    weight_error: float | None
    weight_error_relative: float | None
    activation_error: float | None
    activation_error_relative: float | None
    output_error: float | None
    output_error_relative: float | None
    activation_similarity: float | None
    output_similarity: float | None
    activation_token_error: float | None
    activation_token_error_mean: float | None
    output_token_error: float | None
    output_token_error_mean: float | None


@dataclass
class BlockLosses:
    """Relative squared error of a block's output on x~ against the full-precision block's on x
    (lit_binq.diagnostics.similarity).

    Attributes:
        block: of the whole block's output.
        token: of each token, averaged.
    """

    block: float | None
    token: float | None


@dataclass
class EffectiveRanks:
    """exp of the entropy of the normalised singular values of the outputs, tokens x d, not centred.

    Attributes:
        reference: of y.
        quantized: of y^.
        reference_directions: of y, each token scaled to unit length (what a norm layer keeps of it).
        quantized_directions: the same of y^.
    """

    reference: float | None
    quantized: float | None
    reference_directions: float | None
    quantized_directions: float | None


@dataclass
class ProbeMeasures:
    """One linear layer quantized by one method, the rest of its block in full precision, run on x~.

    Attributes:
        activation_error_relative: |W x~ - W^ x~| / |W x~|, the layer's own error.
        output_error_relative: |W x - W^ x~| / |W x|.
        loss: of the block's output.
    """

    activation_error_relative: float | None
    output_error_relative: float | None
    loss: BlockLosses


@dataclass
class Probe:
    """The single-layer probe of one block.

    Attributes:
        floor: loss of the block with no layer quantized: x~ differs from x already.
        linears: by name of the linear layer, by name of the method.
    """

    floor: BlockLosses
    linears: dict[str, dict[str, ProbeMeasures]]


@dataclass
class BlockMeasures:
    """One block.

    Attributes:
        block: its number, from 0.
        windows: windows measured on.
        window_length: tokens a window.
        before: losses of the closed form; None if not measured.
        after: losses of what is stored, tuned or not.
        ranks: effective ranks of the outputs.
        attention_divergence: mean over windows, heads and queries of KL(full precision || quantized), in nats.
        linears: by name inside the block.
        probe: the single-layer probe, if asked for.
        notes: what could not be measured, and why.
    """

    block: int
    windows: int
    window_length: int
    before: BlockLosses | None
    after: BlockLosses
    ranks: EffectiveRanks
    attention_divergence: float | None
    linears: dict[str, LinearMeasures]
    probe: Probe | None = None
    notes: list[str] = field(default_factory=list)

    def scalars(self) -> dict[str, float]:
        """What a logger wants: every figure of the block and the means over its linear layers, by name."""
        figures: dict[str, float | None] = {"attention_divergence": self.attention_divergence}
        figures |= {f"rank_{k}": v for k, v in vars(self.ranks).items()}
        for when, losses in (("before", self.before), ("after", self.after)):
            figures |= {f"loss_{k}_{when}": v for k, v in vars(losses).items()} if losses else {}
        for f in dataclasses.fields(LinearMeasures):
            known = [v for m in self.linears.values() if (v := getattr(m, f.name)) is not None]
            figures[f.name] = sum(known) / len(known) if known else None
        return {f"block_{self.block}/{name}": value for name, value in figures.items() if value is not None}


def write_diagnostics(path: Path, blocks: list[BlockMeasures]) -> None:
    """Write the diagnostics of a run: {"version": 1, "blocks": [BlockMeasures as an object, ...]}.

    Args:
        path: the file, usually RUN/diagnostics.json.
        blocks: measured blocks, in order.

    Raises:
        LitBinqError: the place cannot be written to.
    """
    write_json(path, {"version": VERSION, "blocks": [dataclasses.asdict(b) for b in blocks]})


def read_diagnostics(path: Path) -> list[BlockMeasures]:
    """Read and check what `write_diagnostics` wrote.

    Raises:
        LitBinqError: no such file, damaged, of another version, or not of this schema.
    """
    where = f"diagnostics {str(path)!r}"
    value = read_json(
        path, VERSION, where, "expected what `litbinq fit` with `diagnostics.windows` wrote: run it again"
    )
    try:
        blocks: list[BlockMeasures] = parse_as(list[BlockMeasures], value.get("blocks"), "blocks")
    except ValueError as error:
        raise LitBinqError(f"{where}: {error}; run the fit again") from None
    return blocks


def parse_as(kind: Any, value: Any, where: str) -> Any:
    """A JSON value as a record, list, dictionary or scalar of a declared type; unknown keys are refused.

    Args:
        kind: a record class of this file, int, float, str, list[...], dict[str, ...] or `... | None`.
        value: what JSON gave.
        where: name of the value, for the error.

    Raises:
        ValueError: the value is of another kind; the message has one line.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):  # always `X | None` here
        if value is None:
            return None
        return parse_as(next(p for p in parts if p is not type(None)), value, where)
    if origin is list and isinstance(value, list):
        return [parse_as(parts[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {k: parse_as(parts[1], v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        if odd := sorted(hints.keys() ^ value.keys()):
            raise ValueError(f"{where}: {'unknown' if odd[0] in value else 'missing'} key {odd[0]!r}")
        return kind(**{k: parse_as(hint, value[k], f"{where}.{k}") for k, hint in hints.items()})  # type: ignore[operator]  # a record class
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if kind in (int, str) and isinstance(value, kind) and not isinstance(value, bool):
        return value
    expected = {list: "a list", dict: "an object", float: "a finite number", int: "a whole number", str: "a text"}
    raise ValueError(f"{where}: got {str(value)[:40]!r}, expected {expected.get(origin or kind, 'an object')}")
