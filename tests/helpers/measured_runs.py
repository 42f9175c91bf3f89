"""Diagnostics of made-up runs."""

from typing import Any

from lit_binq.utils.json_records import (
    BlockLosses,
    BlockMeasures,
    EffectiveRanks,
    LinearMeasures,
    Probe,
    ProbeMeasures,
)

LAYERS = ("self_attn.q_proj", "mlp.down_proj")
BLOCKS = 6


def linear(output: float, conditioned: float, grams: float) -> LinearMeasures:
    return LinearMeasures(
        weight_error=2.0,
        weight_error_relative=0.5,
        activation_error=3.0,
        activation_error_relative=1 - conditioned,
        output_error=4.0,
        output_error_relative=1 - output,
        activation_similarity=conditioned,
        output_similarity=output,
        activation_token_error=1.0,
        activation_token_error_mean=0.5,
        output_token_error=2 * grams,
        output_token_error_mean=grams,
    )


def block(i: int, output: float, conditioned: float = 0.9, grams: float = 1.0, **other: Any) -> BlockMeasures:
    return BlockMeasures(
        block=i,
        windows=2,
        window_length=10,
        before=BlockLosses(0.5, 0.6),
        after=BlockLosses(0.4, 0.5),
        ranks=EffectiveRanks(10.0, 11.0 + i, 12.0, 13.0),
        attention_divergence=0.1 * (i + 1),
        linears={n: linear(output, conditioned, grams) for n in LAYERS},
        **other,
    )


def probed(weight: tuple[float, float], pseudo: tuple[float, float]) -> Probe:
    """(layer error, block loss) of the two methods; pseudo comes first in the file, weight must be the base."""
    methods = {"pseudo_target": pseudo, "weight": weight}
    return Probe(
        BlockLosses(0.1, 0.1),
        {n: {m: ProbeMeasures(e, 0.5, BlockLosses(loss, 0.2)) for m, (e, loss) in methods.items()} for n in LAYERS},
    )


FALLING = [block(i, 0.9 - 0.1 * i, 0.86, grams=1.0 + i) for i in range(BLOCKS)]
STEADY = [block(i, 0.8 + 0.01 * (i % 2), 0.85) for i in range(BLOCKS)]
