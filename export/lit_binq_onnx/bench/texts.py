"""`litbinq bench perplexity`: exported models on the first windows of a text file.

Legend: n windows, T tokens a window.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lit_binq.data.text import TextSource, encode, make_windows, read_text
from lit_binq.errors import LitBinqError
from lit_binq.models.load import load_tokenizer
from lit_binq_onnx.runtime.perplexity import onnx_perplexity
from lit_binq_onnx.runtime.session import OnnxModel

log = logging.getLogger(__name__)


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
        RunError: a folder that is no export.
        LitBinqError: a folder that tokenizes otherwise than the first, no such text, one shorter
            than a window, or fewer than 1 window or 2 tokens.
    """
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
