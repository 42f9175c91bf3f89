"""One candidate of `litbinq bench ops`: a kernel at a shape, checked against float64 and ready to be timed.

It is one session with several copies of its layer, `bench_operators.graph_of`, so many that their weights are ROTATION
times the last cache: when a copy's turn comes again, its weights have left the cache. Knows nothing of rounds and
records.

Legend: M rows of x, K columns, N rows of W.
"""

import math
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from lit_binq_onnx.bench.operators import Kernel, Layer, graph_of
from lit_binq_onnx.runtime.library import register

ROTATION = 3
"""Bytes of all copies of a weight, in last caches. Once would do if the oldest line always left first."""

MOST_BYTES = 1 << 30
"""Most bytes of all copies of a weight: a model in one piece may have 2 GB."""

MOST_ROWS = 1024
"""Most rows that all copies of a product have together, but at least two copies: from M = 128 on the weights are
read once for many rows, and cold ones cost a hundredth of the time."""

_ROWS_CHECKED = 8
_COLUMNS_AT_ONCE = 1024


@dataclass(frozen=True)
class Shape:
    """A product x W^T: x (M, K), W (N, K)."""

    M: int
    K: int
    N: int


class NotTimed(Exception):
    """Why a candidate is not timed."""


def copies_for(layer_bytes: int, cache: int, M: int) -> int:
    """Layers of a session: enough for cold weights, within the limits above."""
    wanted = math.ceil(ROTATION * cache / max(1, layer_bytes))
    return max(1, min(wanted, MOST_BYTES // max(1, layer_bytes), max(2, MOST_ROWS // M)))


def relative_error(y: np.ndarray, x: np.ndarray, layer: Layer) -> float:
    """Root mean square of y - x W^T over that of x W^T, in float64.

    Args:
        y: (M, N); up to 8 of its rows, the first and the last among them, are compared in all columns.
        x: (M, K).
        layer: knows W.
    """
    rows = np.unique(np.linspace(0, len(x) - 1, min(_ROWS_CHECKED, len(x))).astype(int))
    difference = total = 0.0
    for start in range(0, y.shape[1], _COLUMNS_AT_ONCE):
        part = slice(start, start + _COLUMNS_AT_ONCE)
        want = x[rows].astype(np.float64) @ layer.dense(part).T
        difference += float(np.square(y[rows, part] - want).sum())
        total += float(np.square(want).sum())
    # NaN in y gives NaN, which no bound lets pass
    return math.sqrt(difference / total) if total else math.sqrt(difference)


class Candidate:
    """A kernel at a shape, ready to be timed.

    Args:
        kernel: which.
        shape: of the product.
        threads: of ONNX Runtime.
        cache: bytes of last-level cache to rotate past.
        x: (M, K) float32.

    Attributes:
        error: see `relative_error`; the larger one of the first and the last copy.
        copies: see `copies_for`.
        stored_bytes: of one layer.

    Raises:
        NotTimed: refused by the runtime, or wrong.
    """

    def __init__(self, kernel: Kernel, shape: Shape, threads: int, cache: int, x: np.ndarray) -> None:
        self.kernel, self.shape = kernel, shape
        rng = np.random.default_rng(1)
        layers = [kernel.make(rng, shape.K, shape.N, 0)]
        self.stored_bytes = layers[0].stored_bytes
        self.copies = copies_for(self.stored_bytes, cache, shape.M)
        layers += [kernel.make(rng, shape.K, shape.N, i) for i in range(1, self.copies)]
        self.session = self._session(layers, threads)
        last = f"y{self.copies - 1}"
        try:
            results = self.session.run(["y0", last], {"x": x})
        except Exception as error:  # onnxruntime raises its own, undocumented exception types
            raise NotTimed(f"fails ({' '.join(str(error).split())[:150]})") from error
        self.error = max(relative_error(y, x, layer) for y, layer in zip(results, (layers[0], layers[-1]), strict=True))
        if not self.error <= kernel.largest_error:
            raise NotTimed(f"wrong: errs by {self.error:.1e}, expected at most {kernel.largest_error:.0e}")
        if self.error < kernel.smallest_error:
            raise NotTimed(f"not there: ONNX Runtime {ort.__version__} takes its float kernel for it at this shape")
        self._bind(x)

    def _session(self, layers: list[Layer], threads: int) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        # Threads that spin after a session's turn would take the next one's time.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        for key, value in self.kernel.config.items():
            options.add_session_config_entry(key, value)
        ours = self.kernel.mode is not None
        if ours:
            register(options, mode=self.kernel.mode)
        shape = self.shape
        model = graph_of(layers, shape.M, shape.K, shape.N).SerializeToString()
        try:
            return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # as above
            raise NotTimed(f"refused ({' '.join(str(error).split())[:150]})") from error

    def _bind(self, x: np.ndarray) -> None:
        """Bind memory that stays: x once, and one result for all copies, which stays in the cache as in a model."""
        self._binding = self.session.io_binding()
        self._x = ort.OrtValue.ortvalue_from_numpy(x)
        self._y = ort.OrtValue.ortvalue_from_numpy(np.zeros((self.shape.M, self.shape.N), np.float32))
        self._binding.bind_ortvalue_input("x", self._x)
        for output in self.session.get_outputs():
            self._binding.bind_ortvalue_output(output.name, self._y)

    def run(self) -> None:
        """Every copy once."""
        self.session.run_with_iobinding(self._binding)
