"""About how long a fit takes: counted operations over rates that are measured on the spot.

Legend: tokens of training windows and of all windows, F operations a token of a block's forward pass (two for each
weight, and attention), K columns and N rows of a linear layer.

    statistics   half a pass for each group of layers with one input and each stream, and 2 K^2 a token and Gram
    solve        float64: 2 K^3 / 3 + 4 N K^2;  float32: rounds of 6 N K^2, four for all that is not named
    blocks       two passes to move on, one more a scoring;  epochs x training tokens x 3 F
    model        epochs x training tokens x 3 (all blocks and the head), teacher's head 1

A step takes what its products take at ATTAINED of the measured rate, and at least the time its launches take on a GPU.
"""

import math
import time
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from lit_binq.calibration.preflight.estimates import Run
from lit_binq.models.blocks import find_blocks

ATTAINED = {"cuda": 0.2, "cpu": 0.4}
"""Share of a large square product's rate that a block attains: elementwise operations move as many bytes."""

SECONDS = 0.1
"""How long each kind of product is tried."""

STEP_SECONDS = {"cuda": 0.004, "cpu": 0.002}
"""Optimizer, loop and launches of a step, however small the block."""

STAGE_SECONDS = {"cuda": 1.0, "cpu": 0.1}
"""What a tuned stage takes around its steps: copies, packing, a checkpoint, on a GPU the capture of its graph."""


@dataclass
class Rates:
    """Operations a second of float32, of the dtype of steps, and of float64."""

    full: float
    steps: float
    double: float


def measure_rates(device: torch.device, autocast: torch.dtype | None) -> Rates:
    """The fastest product of each kind within a moment: other processes may disturb the others."""
    size = 4096 if device.type == "cuda" else 256

    def rate(dtype: torch.dtype) -> float:
        a = torch.ones(size, size, dtype=dtype, device=device)
        a @ a
        least, end = math.inf, time.perf_counter() + SECONDS
        while least == math.inf or time.perf_counter() < end:
            _wait(device)
            began = time.perf_counter()
            a @ a
            _wait(device)
            least = min(least, time.perf_counter() - began)
        return 2 * size**3 / max(least, 1e-9)

    full = rate(torch.float32)
    return Rates(full, rate(autocast) if autocast is not None else full, rate(torch.float64))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fit_seconds(model: PreTrainedModel, run: Run) -> float:
    """Estimated seconds of a fit, without loading and evaluation."""
    rates = measure_rates(run.device, run.autocast)
    n, T = run.windows
    tokens, train, held = n * T, run.train * T, (n - run.train) * T or run.train * T
    steps = -(-run.train // run.batch)
    kind = "cuda" if run.device.type == "cuda" else "cpu"
    once, around, attained = STEP_SECONDS[kind], STAGE_SECONDS[kind], ATTAINED[kind]
    form, tuning, end_to_end = run.closed_form, run.tuning, run.end_to_end
    streams = {"weight": 0, "naive_output": 1}.get(form.objective, 2)
    total, all_blocks = 0.0, 0.0
    for block in find_blocks(model):
        linears = [(m.out_features, m.in_features) for m in block.modules() if isinstance(m, nn.Linear)]
        F = sum(2 * N * K for N, K in linears) + 2 * T * linears[0][1]
        all_blocks += F
        groups = [K for i, (_, K) in enumerate(linears) if i == 0 or linears[i - 1][1] != K]
        passes = 2 + streams * len(groups) / 2 + (1 + tuning.epochs) * held / tokens
        grams = sum(2 * K * K for K in groups) * streams
        solve = sum((2 * K**3 / 3 + 4 * N * K * K) / rates.double + 24 * N * K * K / rates.full for N, K in linears)
        total += tokens * (passes * F + grams) / (attained * rates.full) + solve
        total += tuning.epochs * (train * 3 * F / (attained * rates.steps) + steps * once)
        total += around if tuning.epochs else 0
    head = model.get_output_embeddings()
    if end_to_end.epochs and isinstance(head, nn.Linear):
        out = 2 * head.out_features * head.in_features
        each = 3 * all_blocks + 4 * out
        total += tokens * all_blocks / (attained * rates.steps)
        total += around + end_to_end.epochs * ((train + held / 3) * each / (attained * rates.steps) + steps * once)
    return total
