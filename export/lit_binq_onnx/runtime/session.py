"""An exported folder, opened for running: one forward pass at a time, the cache staying inside ONNX Runtime.

There are two routes through the same weights:

    generic   model.onnx, traced: any architecture, any padding; the graph joins old and new keys in each pass
    fused     model_fused.onnx, where the export wrote one: keys and values stay in one buffer (`cache.StaticCache`),
              attention reads grouped heads without repeating them

Knows ONNX Runtime and the files of an export; torch is not needed to run one.

Legend: b batch, s new tokens, p tokens in the cache, V vocabulary.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort

from lit_binq_onnx.runtime.cache import FIRST_CAPACITY, StaticCache, row_lengths
from lit_binq_onnx.runtime.errors import RunError
from lit_binq_onnx.runtime.graph_bytes import with_float_activations
from lit_binq_onnx.runtime.library import HOW_TO_BUILD, Mode, register
from lit_binq_onnx.runtime.step import TokenStep

log = logging.getLogger(__name__)

MODEL = "model.onnx"
FUSED = "model_fused.onnx"
DATA = "model.onnx.data"
FACTS = "lit_binq_onnx.json"
FACTS_VERSION = 1

LOGITS_START = "logits_start"
"""Optional input of the fused graph, (1,) int64: the first of the new tokens whose logits are wanted."""

Route = Literal["auto", "fused", "generic"]
GrowingCache = Sequence[ort.OrtValue | np.ndarray]
"""Of the generic route: [key 0, value 0, key 1, ...], each (b, heads, p, head_dim) float32."""

Cache = GrowingCache | StaticCache

FUSED_BODIES_SINCE = (1, 24)
"""First ONNX Runtime in which the body of CachedAttention means what the native operator does: before 1.24 its
GroupQueryAttention lets a window see a token too many, before 1.20 it takes a prompt in one part only."""

_warned: set[str] = set()


def fused_bodies_trusted() -> bool:
    """Whether this ONNX Runtime may run the fused graph without the native library, see `FUSED_BODIES_SINCE`."""
    return ort_version() >= FUSED_BODIES_SINCE


def ort_version() -> tuple[int, int]:
    """Major and minor version of the ONNX Runtime that is imported."""
    major, minor = ort.__version__.split(".")[:2]
    return int(major), int(minor)


def cache_names(blocks: int) -> tuple[list[str], list[str]]:
    """Names of the cache's inputs and outputs, in the order of `Cache`."""
    pairs = [f"{i}.{kind}" for i in range(blocks) for kind in ("key", "value")]
    return [f"past_key_values.{pair}" for pair in pairs], [f"present.{pair}" for pair in pairs]


def read_facts(folder: str | Path) -> dict[str, Any]:
    """What an export wrote about itself, after checking that its files are all there.

    Keys: version, architecture, true_bits, packed_nodes, nodes, opset, data_bytes, token_bytes (what a token reads of
    them at most; absent: all), max_positions (int or None), head_bits (0 or absent: the embedding and head are not
    rounded), head_block and head_text (how they were; None or absent: by default), fused (whether there is a fused
    graph), angles ({"kind": "longrope" or "dynamic", "limit": longest text with the first angles}; None or absent: a
    position has the same angles in every text, see `rows`), packed (path of the packed folder relative to this one, or
    None), versions.

    Raises:
        RunError: no such folder, not one of ours, or a file is missing or too short.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"exported folder {str(folder)!r}: no such folder; expected what `litbinq export` wrote")
    if not (folder / MODEL).is_file():
        raise RunError(f"exported folder {str(folder)!r}: no {MODEL} in it; expected what `litbinq export` wrote")
    if not (folder / FACTS).is_file():
        raise RunError(
            f"exported folder {str(folder)!r}: no {FACTS} in it, so it is not one of ours; "
            "expected what `litbinq export` wrote"
        )
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        version, data_bytes = facts["version"], int(facts["data_bytes"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"exported folder {str(folder)!r}: {FACTS} is damaged ({error!r}); export again") from error
    if version != FACTS_VERSION:
        raise RunError(
            f"exported folder {str(folder)!r}: version {version!r}, expected {FACTS_VERSION}; "
            "it was written by another version of this program: export again"
        )
    data = folder / DATA
    if not data.is_file():
        raise RunError(
            f"exported folder {str(folder)!r}: {DATA} is missing, expected {data_bytes} bytes; "
            f"it belongs beside {MODEL}: copy it there or export again"
        )
    if data.stat().st_size < data_bytes:
        raise RunError(
            f"exported folder {str(folder)!r}: {DATA} is truncated to {data.stat().st_size} bytes, "
            f"expected {data_bytes}: copy it again or export again"
        )
    return dict(facts)


class OnnxModel:
    """An exported model in a session of ONNX Runtime on the CPU.

    Args:
        folder: what `export_onnx` wrote.
        native: None uses the native library where it is installed, and says once what is lost where it is
            not; True requires it; False runs the function bodies of the file on unmodified ONNX Runtime.
        mode: of the native operators: "lut" (int8 tables, fast) or "exact" (float32 activations). The
            function bodies always compute in float32. A rounded head follows it, with or without the library: its
            activations are int8 in "lut" and float32 in "exact", which is slow.
        threads: of ONNX Runtime inside an operator; 0 lets it choose.
        route: "auto" takes the fused graph where there is one, and the generic one for what that cannot
            express; "fused" requires it; "generic" leaves it alone.

    Attributes:
        folder: as given.
        facts: see `read_facts`.
        native: whether the native operators are used.
        mode: as given; "exact" without the native operators.
        route: "fused" or "generic".
        cache_shapes: (heads, head_dim) of every cache tensor.

    Raises:
        RunError: see `read_facts`; the library is required and missing; there is no fused graph and it is
            required; ONNX Runtime refuses the file.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        native: bool | None = None,
        mode: Mode = "lut",
        threads: int = 0,
        route: Route = "auto",
    ) -> None:
        if mode not in ("lut", "exact"):
            raise RunError(f"mode: got {mode!r}, expected 'lut' or 'exact'")
        if route not in ("auto", "fused", "generic"):
            raise RunError(f"route: got {route!r}, expected 'auto', 'fused' or 'generic'")
        if threads < 0:
            raise RunError(f"threads: got {threads}, expected a number from 0 (ONNX Runtime chooses)")
        self.folder = Path(folder)
        self.facts = read_facts(folder)
        fused = bool(self.facts.get("fused")) and (self.folder / FUSED).is_file()
        if route == "fused" and not fused:
            raise RunError(
                f"exported folder {str(folder)!r}: no {FUSED} in it, expected one: export again with `--fused auto`, "
                "or use the generic route"
            )
        self.route: Literal["fused", "generic"] = "fused" if fused and route != "generic" else "generic"
        self._given: dict[str, Any] = {"native": native, "mode": mode, "threads": threads}
        self._generic: OnnxModel | None = None
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # ONNX Runtime 1.18 plans memory once for a shape, and its second run then overwrites bound buffers.
        options.enable_mem_pattern = ort_version() >= (1, 19)
        options.log_severity_level = 3  # errors: its warnings are about graph rewrites no user can act on
        self.native = native is not False and register(options, required=native is True, mode=mode)
        self.mode: Mode = mode if self.native else "exact"
        if native is None and not self.native and "native" not in _warned:
            _warned.add("native")
            log.warning(
                "no native operator library: running the function bodies on ONNX Runtime's own operators: expect "
                "several times slower and more memory; %s",
                HOW_TO_BUILD,
            )
        if self.route == "fused" and not self.native and not fused_bodies_trusted():
            since = ".".join(map(str, FUSED_BODIES_SINCE))
            told = (
                f"ONNX Runtime {ort.__version__} runs the fused graph's function bodies otherwise (sliding windows, "
                f"prompts in parts), expected {since} or newer, or the native library"
            )
            if route == "fused":
                raise RunError(f"route: got 'fused', but {told}: leave `route` at 'auto'")
            self.route = "generic"
            if "bodies" not in _warned:
                _warned.add("bodies")
                log.warning("%s: taking the generic graph instead; %s", told, HOW_TO_BUILD)
        name = FUSED if self.route == "fused" else MODEL
        try:
            source: Path | bytes = self.folder / name
            if mode == "exact" and not self.native and self.facts.get("head_bits"):
                # Our NBitsMatMul takes the session's mode; in its body, a MatMulNBits, it is an attribute.
                source = with_float_activations((self.folder / name).read_bytes())
                options.add_session_config_entry(_DATA_FOLDER, str(self.folder.resolve()))
            self.session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises its own, undocumented exception types
            raise RunError(
                f"exported folder {str(folder)!r}: ONNX Runtime {ort.__version__} refuses {name} "
                f"({' '.join(str(error).split())[:300]}); expected an undamaged export: export again"
            ) from error
        self._shrinking = ort.RunOptions()
        self._shrinking.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        past = [i for i in self.session.get_inputs() if i.name.startswith("past_key_values.")]
        self._past_names = [i.name for i in past]
        self.cache_shapes: list[tuple[int, int]] = [(i.shape[1], i.shape[3]) for i in past]
        self._outputs = [o.name for o in self.session.get_outputs()]
        self._vocabulary = self.session.get_outputs()[0].shape[-1]

    def empty_past(self, batch: int = 1, capacity: int = 0) -> Cache:
        """A cache without tokens.

        Args:
            batch: b.
            capacity: tokens that the text will have, where that is known: the fused route then never moves its cache.
        """
        if self.route == "fused":
            limit = self.facts.get("max_positions")
            room = capacity or FIRST_CAPACITY
            return StaticCache(self.cache_shapes, batch, room if limit is None else min(room, limit), limit)
        return [
            ort.OrtValue.ortvalue_from_numpy(np.zeros((batch, heads, 0, size), np.float32))
            for heads, size in self.cache_shapes
        ]

    def forward(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        position_ids: np.ndarray,
        past: Cache,
        *,
        last_only: bool = False,
    ) -> tuple[np.ndarray, Cache]:
        """One pass.

        Args:
            input_ids: (b, s) int64.
            attention_mask: (b, p + s) int64, 0 at padding.
            position_ids: (b, s) int64, counted without padding.
            past: the cache so far, p tokens: `empty_past`, or what the last call returned.
            last_only: give the logits of the last new position only; the fused route then computes no others.

        Returns:
            logits (b, s, V) float32, or (b, 1, V), and the new cache, p + s tokens. The cache stays with ONNX
            Runtime, so that giving it back copies nothing; `cache_arrays` shows its values. On the fused route it is
            the very object that came in, with the new tokens written into it.

        Raises:
            RunError: ONNX Runtime fails, for instance on a token number the model does not have, or the
                fused route is asked in mid-text for what it cannot express.
        """
        if not isinstance(past, StaticCache):
            runner = self if self.route == "generic" else self._fall_back()
            return runner._forward_growing(input_ids, attention_mask, position_ids, past, last_only)
        lengths = row_lengths(input_ids, attention_mask, position_ids, past)
        if lengths is not None:
            return self._forward_static(input_ids, lengths, past, last_only), past
        if past.length:
            raise RunError(
                f"fused route: got rows of {past.lengths.tolist()} tokens and a mask or positions that do not go on "
                "from them; expected rows without padding on their left: open the model with route='generic'"
            )
        # Padding on the left from the start: the whole text takes the generic route.
        runner = self._fall_back()
        empty = runner.empty_past(len(input_ids))
        return runner.forward(input_ids, attention_mask, position_ids, empty, last_only=last_only)

    def step(self, tokens: np.ndarray, cache: StaticCache) -> np.ndarray:
        """One more token for each row of a static cache: a pass of `forward` without what it costs to prepare one.

        Args:
            tokens: (b,) integers.
            cache: made by this model's `empty_past`, on the fused route; the tokens are written into it.

        Returns:
            logits (b, V) float32; the next call with this cache overwrites them.

        Raises:
            RunError: as `forward`.
        """
        longest = cache.length + 1
        cache.reserve(longest)
        try:
            if cache.step is None:
                names = self._past_names, self._outputs[1:]
                cache.step = TokenStep(self.session, cache, *names, self._vocabulary, LOGITS_START)
            logits = cache.step.run(tokens, cache.lengths)
        except Exception as error:  # as above
            raise _failure(np.reshape(tokens, (-1, 1)), longest, error) from error
        cache.lengths = cache.lengths + 1
        return logits

    def _fall_back(self) -> "OnnxModel":
        """The generic route of the same folder, opened when it is first needed."""
        if self._generic is None:
            log.info("padding on the left: the fused graph cannot express it, opening %s beside it", MODEL)
            self._generic = OnnxModel(self.folder, route="generic", **self._given)
        return self._generic

    def _forward_static(
        self, input_ids: np.ndarray, lengths: np.ndarray, cache: StaticCache, last_only: bool
    ) -> np.ndarray:
        """A pass of the fused graph; see `forward`. lengths (b,): tokens of each row, new ones included."""
        b, s = input_ids.shape
        total = int(lengths.max())
        cache.reserve(total)
        if b > 1 and s > 1 and cache.length:  # the operator takes several new tokens of one row only
            rows = []
            for i in range(b):
                row = cache.row(i)
                rows.append(self._forward_static(input_ids[i : i + 1], lengths[i : i + 1], row, last_only))
            cache.lengths = lengths
            return np.concatenate(rows)
        binding = cache.binding(self.session, self._past_names, self._outputs[1:])
        mask = np.arange(total) < lengths[:, None]
        logits = np.empty((b, 1 if last_only else s, self._vocabulary), np.float32)
        feed = {"input_ids": input_ids, "attention_mask": mask, LOGITS_START: np.array([-1 if last_only else 0])}
        try:
            for name, value in feed.items():
                made = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value, np.int64))
                binding.bind_ortvalue_input(name, made)
            binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
            # Decoding needs little of the memory that a prompt takes: the runtime frees its arena after one.
            self.session.run_with_iobinding(binding, self._shrinking if last_only and s > 1 else None)
        except Exception as error:  # as above
            raise _failure(input_ids, total, error) from error
        cache.lengths = lengths
        return logits

    def _forward_growing(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        position_ids: np.ndarray,
        past: GrowingCache,
        last_only: bool,
    ) -> tuple[np.ndarray, list[ort.OrtValue]]:
        """A pass of the generic graph; see `forward`."""
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
            raise _failure(input_ids, attention_mask.shape[1], error) from error
        values = logits.numpy()
        return values[:, -1:] if last_only else values, present


_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
"""Session option: where the data file of a model is that comes as bytes."""


def _failure(input_ids: np.ndarray, total: int, error: Exception) -> RunError:
    return RunError(
        f"ONNX Runtime failed on input_ids {tuple(input_ids.shape)} with {total} "
        f"positions ({' '.join(str(error).split())[:300]}); "
        "expected token numbers and lengths the model has"
    )


def cache_arrays(cache: Cache) -> list[np.ndarray]:
    """Keys and values of a cache of either route: [key 0, value 0, ...], each (b, heads, tokens, head_dim)."""
    if isinstance(cache, StaticCache):
        return cache.arrays()
    return [value if isinstance(value, np.ndarray) else value.numpy() for value in cache]


def positions(attention_mask: np.ndarray) -> np.ndarray:
    """Position of every token counted without padding, (b, n) int64; 0 at padding before the text.

    Args:
        attention_mask: (b, n), 1 at tokens and 0 at padding.
    """
    return np.maximum(np.cumsum(attention_mask, axis=1) - 1, 0).astype(np.int64)
