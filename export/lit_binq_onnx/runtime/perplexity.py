"""Perplexity of an exported model, defined as in `lit_binq.evaluation.perplexity.TokenPerplexity`, on windows or on a
text file.

Legend: n windows, T tokens a window, V vocabulary, b windows in a pass, t positions in a pass.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from lit_binq.errors import LitBinqError
from lit_binq_onnx.runtime.session import OnnxModel

log = logging.getLogger(__name__)

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
        LitBinqError: the windows are no (n, T) integers with T >= 2, are longer than the model's positions,
            or the model gives logits that are not finite.
    """
    ids = np.asarray(windows)
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2 or not np.issubdtype(ids.dtype, np.integer):
        raise LitBinqError(
            f"windows: got {ids.dtype} of shape {ids.shape}, expected integers (n, T) with n >= 1 and T >= 2"
        )
    if batch < 1:
        raise LitBinqError(f"batch: got {batch}, expected 1 or more")
    limit = onnx_model.facts.get("max_positions")
    if limit is not None and ids.shape[1] > limit:
        raise LitBinqError(
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
        raise LitBinqError(
            "perplexity: the logits are not finite (NaN or inf), expected finite ones: the exported model is damaged"
        )
    tokens = last * len(ids)
    return Perplexity(float(np.exp(nll / tokens)), nll, tokens)


@dataclass(frozen=True)
class TextRecord:
    """One model on one text.

    Attributes:
        name: the exported folder's name; its path as given where another folder has the same name.
        perplexity: over all predicted tokens.
        tokens: how many these are.
        true_bits: of the blocks (lit_binq.hub.bits).
        head_bits: of the head; 0 as it was.
        data_bytes: of the tensors' file.
    """

    name: str
    perplexity: float
    tokens: int
    true_bits: float
    head_bits: int
    data_bytes: int


def text_perplexities(
    folders: Sequence[str | Path],
    text: str | Path,
    *,
    windows: int = 24,
    length: int = 256,
    mode: Literal["lut", "exact"] = "lut",
) -> list[TextRecord]:
    """Perplexities of exported models on the first windows of a text file, without special tokens.

    Args:
        folders: written by `lit_binq_onnx.build.export`, one after the other opened and closed again.
        text: plain UTF-8.
        windows: n; fewer where the text is too short, which is told.
        length: T.
        mode: kernels of our operators.

    Raises:
        LitBinqError: a folder that is no export or tokenizes otherwise than the first, no such text, one shorter
            than a window, or fewer than 1 window or 2 tokens.
    """
    import torch  # as what follows: models that only run need neither it nor transformers

    from lit_binq.data.text import TextSource, encode, make_windows, read_text
    from lit_binq.models.load import load_tokenizer

    if length < 2:
        raise LitBinqError(f"length: got {length}, expected 2 tokens or more: the first one is given")
    source = read_text(TextSource(str(text)))
    records: list[TextRecord] = []
    first = None
    named = [Path(folder).resolve().name for folder in folders]
    for folder in map(Path, folders):
        model = OnnxModel(folder, mode=mode)
        ids = make_windows(encode(load_tokenizer(str(folder)), source), length, windows)
        if first is None and len(ids) < windows:
            log.warning("text %r gives only %d windows of %d tokens instead of %d", str(text), *ids.shape, windows)
        first = ids if first is None else first
        if not torch.equal(ids, first):
            raise LitBinqError(
                f"{str(folder)!r}: tokenizes the text otherwise than {str(folders[0])!r}, expected one tokenizer: "
                "perplexities of different tokens cannot be compared"
            )
        found, facts = onnx_perplexity(model, ids), model.facts
        numbers = (float(facts["true_bits"]), int(facts["head_bits"]), int(facts["data_bytes"]))
        name = folder.resolve().name
        name = name if named.count(name) == 1 else str(folder)
        records.append(TextRecord(name, found.ppl, found.tokens, *numbers))
    return records
