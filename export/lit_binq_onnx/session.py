"""An exported folder, opened for running: one forward pass at a time, the cache staying inside ONNX Runtime.

Knows ONNX Runtime and the files of an export; torch is not needed to run one.

Legend: b batch, s new tokens, p tokens in the cache, V vocabulary.
"""

import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort

from lit_binq.errors import LitBinqError
from lit_binq_onnx.library import HOW_TO_BUILD, NativeLibrary, library_path, register

log = logging.getLogger(__name__)

MODEL = "model.onnx"
DATA = "model.onnx.data"
FACTS = "lit_binq_onnx.json"
FACTS_VERSION = 1

Mode = Literal["lut", "exact"]
Cache = Sequence[ort.OrtValue | np.ndarray]
"""[key 0, value 0, key 1, ...], each (b, heads, p, head_dim) float32."""

_warned: set[str] = set()


def cache_names(blocks: int) -> tuple[list[str], list[str]]:
    """Names of the cache's inputs and outputs, in the order of `Cache`."""
    pairs = [f"{i}.{kind}" for i in range(blocks) for kind in ("key", "value")]
    return [f"past_key_values.{pair}" for pair in pairs], [f"present.{pair}" for pair in pairs]


def read_facts(folder: str | Path) -> dict[str, Any]:
    """What an export wrote about itself, after checking that its files are all there.

    Keys: version, architecture, true_bits, packed_nodes, nodes, opset, data_bytes, max_positions
    (int or None), packed (path of the packed folder relative to this one, or None), versions.

    Raises:
        LitBinqError: no such folder, not one of ours, or a file is missing or too short.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LitBinqError(f"exported folder {str(folder)!r}: no such folder; expected what `litbinq export` wrote")
    if not (folder / MODEL).is_file():
        raise LitBinqError(f"exported folder {str(folder)!r}: no {MODEL} in it; expected what `litbinq export` wrote")
    if not (folder / FACTS).is_file():
        raise LitBinqError(
            f"exported folder {str(folder)!r}: no {FACTS} in it, so it is not one of ours; "
            "expected what `litbinq export` wrote"
        )
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        version, data_bytes = facts["version"], int(facts["data_bytes"])
    except (ValueError, KeyError, TypeError) as error:
        raise LitBinqError(f"exported folder {str(folder)!r}: {FACTS} is damaged ({error!r}); export again") from error
    if version != FACTS_VERSION:
        raise LitBinqError(
            f"exported folder {str(folder)!r}: version {version!r}, expected {FACTS_VERSION}; "
            "it was written by another version of this program: export again"
        )
    data = folder / DATA
    if not data.is_file():
        raise LitBinqError(
            f"exported folder {str(folder)!r}: {DATA} is missing, expected {data_bytes} bytes; "
            f"it belongs beside {MODEL}: copy it there or export again"
        )
    if data.stat().st_size < data_bytes:
        raise LitBinqError(
            f"exported folder {str(folder)!r}: {DATA} is truncated to {data.stat().st_size} bytes, "
            f"expected {data_bytes}: copy it again or export again"
        )
    return dict(facts)


class OnnxModel:
    """An exported model in a session of ONNX Runtime on the CPU.

    Args:
        folder: what `export_onnx` wrote.
        native: None uses the native library where it is installed, and says once what is lost where it is
            not; True requires it; False runs the function bodies of the file on stock ONNX Runtime.
        mode: of the native operators: "lut" (int8 tables, fast) or "exact" (float32 activations). The
            function bodies always compute in float32.
        threads: of ONNX Runtime inside an operator; 0 lets it choose.

    Attributes:
        folder: as given.
        facts: see `read_facts`.
        native: whether the native operators are used.
        mode: as given; "exact" without the native operators.
        cache_shapes: (heads, head_dim) of every cache tensor.

    Raises:
        LitBinqError: see `read_facts`; the library is required and missing; ONNX Runtime refuses the file.
    """

    def __init__(self, folder: str | Path, *, native: bool | None = None, mode: Mode = "lut", threads: int = 0) -> None:
        if mode not in ("lut", "exact"):
            raise LitBinqError(f"mode: got {mode!r}, expected 'lut' or 'exact'")
        if threads < 0:
            raise LitBinqError(f"threads: got {threads}, expected a number from 0 (ONNX Runtime chooses)")
        self.folder = Path(folder)
        self.facts = read_facts(folder)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors: its warnings are about graph rewrites no user can act on
        self.native = native is not False and register(options, required=native is True)
        self.mode: Mode = mode if self.native else "exact"
        if native is None and not self.native and "native" not in _warned:
            _warned.add("native")
            log.warning(
                "no native operator library: running the stock ONNX function bodies: expect several times "
                "slower and more memory; %s",
                HOW_TO_BUILD,
            )
        # A kernel reads its mode when it is created, that is within the session's constructor.
        with NativeLibrary(library_path()).force_mode(mode) if self.native else nullcontext():
            try:
                self.session = ort.InferenceSession(self.folder / MODEL, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # onnxruntime raises its own, undocumented exception types
                raise LitBinqError(
                    f"exported folder {str(folder)!r}: ONNX Runtime {ort.__version__} refuses {MODEL} "
                    f"({' '.join(str(error).split())[:300]}); expected an undamaged export: export again"
                ) from error
        inputs = self.session.get_inputs()
        self._past_names = [i.name for i in inputs if i.name.startswith("past_key_values.")]
        self.cache_shapes: list[tuple[int, int]] = [
            (i.shape[1], i.shape[3]) for i in inputs if i.name.startswith("past_key_values.")
        ]
        self._outputs = [o.name for o in self.session.get_outputs()]

    def empty_past(self, batch: int = 1) -> list[ort.OrtValue]:
        """A cache without tokens: [key 0, value 0, ...], each (batch, heads, 0, head_dim) float32."""
        return [
            ort.OrtValue.ortvalue_from_numpy(np.zeros((batch, heads, 0, size), np.float32))
            for heads, size in self.cache_shapes
        ]

    def forward(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, position_ids: np.ndarray, past: Cache
    ) -> tuple[np.ndarray, list[ort.OrtValue]]:
        """One pass.

        Args:
            input_ids: (b, s) int64.
            attention_mask: (b, p + s) int64, 0 at padding.
            position_ids: (b, s) int64, counted without padding.
            past: the cache so far, p tokens: `empty_past`, or what the last call returned.

        Returns:
            logits (b, s, V) float32, and the new cache, p + s tokens. The cache stays with ONNX Runtime, so
            that giving it back copies nothing; `.numpy()` of an entry shows its values.

        Raises:
            LitBinqError: ONNX Runtime fails, for instance on a token number the model does not have.
        """
        feed = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value, np.int64))
            for name, value in (
                ("input_ids", input_ids),
                ("attention_mask", attention_mask),
                ("position_ids", position_ids),
            )
        }
        for name, value in zip(self._past_names, past, strict=True):
            feed[name] = ort.OrtValue.ortvalue_from_numpy(value) if isinstance(value, np.ndarray) else value
        try:
            logits, *present = self.session.run_with_ort_values(self._outputs, feed)
        except Exception as error:  # as above
            raise LitBinqError(
                f"ONNX Runtime failed on input_ids {tuple(input_ids.shape)} with {attention_mask.shape[1]} "
                f"positions ({' '.join(str(error).split())[:300]}); "
                "expected token numbers and lengths the model has"
            ) from error
        return logits.numpy(), present


def positions(attention_mask: np.ndarray) -> np.ndarray:
    """Position of every token counted without padding, (b, n) int64; 0 at padding before the text.

    Args:
        attention_mask: (b, n), 1 at tokens and 0 at padding.
    """
    return np.maximum(np.cumsum(attention_mask, axis=1) - 1, 0).astype(np.int64)
