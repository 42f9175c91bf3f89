"""Perplexity of an exported model on windows of tokens, defined as in `lit_binq.evaluation.perplexity`.

Legend: n windows, T tokens a window, V vocabulary, b windows in a pass, t positions in a pass.
"""

from typing import Any, NamedTuple

import numpy as np

from lit_binq_onnx.runtime.errors import RunError
from lit_binq_onnx.runtime.session import OnnxModel

LOGITS_BYTES = 64 << 20
"""Most bytes of logits in one pass: b t V 4; a window is fed in parts, the cache carrying the context."""


class Perplexity(NamedTuple):
    """exp(nll / tokens), the summed negative log-likelihood in nats, and the number of predicted tokens."""

    ppl: float
    nll: float
    tokens: int


def token_nll(logits: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of each target.

    Args:
        logits: (m, V) float32.
        target: (m,) int64.

    Returns:
        (m,) float64, nats.
    """
    largest = logits.max(axis=1, keepdims=True)
    total = np.exp(logits - largest).sum(axis=1, dtype=np.float64)
    chosen = np.take_along_axis(logits, target[:, None], axis=1)[:, 0]
    return np.log(total) + (largest[:, 0].astype(np.float64) - chosen)


def onnx_perplexity(onnx_model: OnnxModel, windows: Any, *, batch: int = 4) -> Perplexity:
    """Perplexity over windows: mean over the T - 1 predictions of each, the first token being given.

    Args:
        onnx_model: an exported model.
        windows: (n, T) integers, an array or a torch tensor on the CPU.
        batch: windows in a pass.

    Returns:
        (ppl, nll, tokens).

    Raises:
        RunError: the windows are no (n, T) integers with T >= 2, are longer than the model's positions,
            or the model gives logits that are not finite.
    """
    ids = np.asarray(windows)
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2 or not np.issubdtype(ids.dtype, np.integer):
        raise RunError(
            f"windows: got {ids.dtype} of shape {ids.shape}, expected integers (n, T) with n >= 1 and T >= 2"
        )
    if batch < 1:
        raise RunError(f"batch: got {batch}, expected 1 or more")
    limit = onnx_model.facts.get("max_positions")
    if limit is not None and ids.shape[1] > limit:
        raise RunError(
            f"windows: got {ids.shape[1]} tokens each, expected at most the model's {limit} positions: "
            "shorten the windows"
        )
    ids = ids.astype(np.int64)
    # angles that depend on the length of the text: what is longer than their limit is one pass
    angles = onnx_model.facts.get("angles")
    whole = angles is not None and ids.shape[1] - 1 > int(angles["limit"])
    last = ids.shape[1] - 1  # nothing follows the last token: it is not fed
    nll, step = 0.0, 32  # the first pass is short: it shows how large V is
    for group in (ids[i : i + batch] for i in range(0, len(ids), batch)):
        past, start = onnx_model.empty_past(len(group)), 0
        while start < last:
            stop = last if whole else min(start + step, last)
            where = np.broadcast_to(np.arange(start, stop), (len(group), stop - start))
            logits, past = onnx_model.forward(group[:, start:stop], np.ones((len(group), stop)), where, past)
            losses = token_nll(logits.reshape(-1, logits.shape[2]), group[:, start + 1 : stop + 1].reshape(-1))
            nll += float(losses.sum())
            start, step = stop, max(1, LOGITS_BYTES // (4 * batch * logits.shape[2]))
    if not np.isfinite(nll):
        raise RunError(
            "perplexity: the logits are not finite (NaN or inf), expected finite ones: the exported model is damaged"
        )
    tokens = last * len(ids)
    return Perplexity(float(np.exp(nll / tokens)), nll, tokens)
