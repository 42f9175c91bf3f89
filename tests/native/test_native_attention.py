"""CachedAttention: float64 attention in every kind of pass, in place or not, and the runtime's own operator as body.

Legend: as in attention_problems.py.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import HELPERS
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_problems import OUTPUTS, Problem
from lit_binq_onnx.functions import add_functions
from native import KernelLibrary, instruction_sets, require_kernels, session


@pytest.fixture(scope="module")
def native() -> KernelLibrary:
    return require_kernels()


def everywhere(native: KernelLibrary, p: Problem, tolerance: float = 2e-6) -> list[np.ndarray]:
    """Against float64 on every instruction set, with present in memory of its own and, where it fits, in past's."""
    got = []
    for isa in instruction_sets(native):
        got = p.run(native, isa=isa)
        p.close(got, tolerance=tolerance)
        if p.room >= p.total:
            opened = session(p.model(), native.on(isa))
            p.close(p.run_in_place(opened), in_place=True, tolerance=tolerance)
    return got


@pytest.mark.parametrize("past", [0, 1, 63, 64, 300])
@pytest.mark.parametrize("s", [1, 2, 17, 64, 65, 200])
def test_attention_is_that_of_float64(native: KernelLibrary, s: int, past: int) -> None:
    everywhere(native, Problem(6, 2, 32, [past + s], s, past + s + 5, past + s))


@pytest.mark.parametrize("s", [1, 9, 70])
@pytest.mark.parametrize(("h", "k", "d"), [(1, 1, 16), (4, 4, 48), (9, 3, 64), (8, 1, 80), (26, 2, 16), (2, 1, 256)])
def test_heads_of_all_sizes(native: KernelLibrary, h: int, k: int, d: int, s: int) -> None:
    """Groups of one, of more than registers take at once; widths that are no multiple of a product's columns."""
    everywhere(native, Problem(h, k, d, [s + 20, s + 70], s, 200, s + 70, packed=h % 2 == 0))


def test_one_tile_takes_no_more_than_one_token(native: KernelLibrary) -> None:
    """More heads in a group than a tile has rows."""
    everywhere(native, Problem(200, 1, 16, [12], 3, 12, 12))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("s", [1, 5, 64])
def test_rows_of_different_lengths(native: KernelLibrary, s: int, packed: bool) -> None:
    """A row without past, one that ends with a block of keys, one far behind it; room for more than all."""
    everywhere(native, Problem(6, 3, 16, [s, 64 + s, 300 + s], s, 450, 420, packed=packed))


def test_first_prompts_of_different_lengths(native: KernelLibrary) -> None:
    """Padding on the right gets zeros, and nothing of it reaches the cache or another token."""
    p = Problem(4, 2, 16, [70, 1, 0, 130, 64], 130, 140, 130)
    for i, n in enumerate(p.lengths):
        p.inputs["query"][i, n:] = np.nan
    everywhere(native, p)
    everywhere(native, Problem(4, 2, 16, [1, 0], 1, 1, 1))


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 100, 10**9, 2**40])
@pytest.mark.parametrize("s", [1, 3, 130])
def test_windows(native: KernelLibrary, window: int, s: int) -> None:
    everywhere(native, Problem(4, 2, 16, [s, s + 90, s + 260], s, 400, 395, window=window))


@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_any_sizes(native: KernelLibrary, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, 3))
    s = data.draw(st.sampled_from([0, 1, 1, 2, 7, 33, 80]))
    first = data.draw(st.booleans())
    lengths = data.draw(st.lists(st.integers(0, s) if first else st.integers(s, s + 150), min_size=0, max_size=3))
    total = s if first else max([*lengths, s + 1]) + data.draw(st.integers(0, 9))
    least = max([n - (0 if first else s) for n in lengths], default=0)
    p = Problem(
        k * data.draw(st.integers(1, 8)),
        k,
        16 * data.draw(st.integers(1, 5)),
        lengths,
        s,
        data.draw(st.sampled_from([least, total, total + 7])),
        total,
        window=data.draw(st.sampled_from([-1, 1, 5, 64])),
        packed=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 99)),
    )
    everywhere(native, p)


# --- the runtime's own operator


@pytest.mark.parametrize("window", [-1, 9])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("lengths", "s", "total"),
    [([1], 1, 1), ([40, 12, 90], 1, 90), ([30], 30, 30), ([30, 7, 1], 30, 30), ([75], 5, 75), ([70, 40], 1, 80)],
)
def test_the_body_is_the_runtimes_operator(
    native: KernelLibrary, lengths: list[int], s: int, total: int, packed: bool, window: int
) -> None:
    """To 1e-5, but for what lies in padding."""
    if ort.__version__.startswith("1.18.") and (window > 0 or 1 < s < total):
        pytest.skip("ONNX Runtime 1.18 sees a token more than its window, and reads prompts in one part only")
    p = Problem(6, 2, 32, lengths, s, 100, total, window=window, packed=packed)
    p.inputs |= {name: np.nan_to_num(p.inputs[name]) for name in ("past_key", "past_value")}
    got, unmodified = p.run(native), p.run(None)
    for mine, theirs in zip(got, unmodified, strict=True):
        assert mine.shape == theirs.shape
        for i, n in enumerate(p.lengths):
            a, b = (x[i, : p.new(i)] if x.ndim == 3 else x[i, :, :n] for x in (mine, theirs))
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_natively_one_node_runs(native: KernelLibrary, tmp_path: Path) -> None:
    p = Problem(4, 2, 16, [9], 1, 16, 9)
    made = p.model(body=True)
    onnx.checker.check_model(made)
    for library, kind in ((native, "CachedAttention"), (None, "GroupQueryAttention")):
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.log_severity_level = 4
        if library is not None:
            options.register_custom_ops_library(str(library.path))
        ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
        assert [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node] == [kind]


def test_adding_bodies_twice_changes_nothing() -> None:
    made = Problem(4, 2, 16, [9], 1, 16, 9).model(body=True)
    assert [f.name for f in made.functions] == ["CachedAttention"]
    assert {o.domain for o in made.opset_import} == {"", "lit_binq", "com.microsoft"}
    once = made.SerializeToString(deterministic=True)
    add_functions(made)
    assert made.SerializeToString(deterministic=True) == once


@pytest.mark.parametrize("packed", [True, False])
def test_the_width_of_heads_is_inferred(native: KernelLibrary, packed: bool) -> None:
    p = Problem(6, 2, 32, [9], 1, 16, 9, packed=packed)
    made = p.model()
    for value in made.graph.input:
        dims, shape = value.type.tensor_type.shape.dim, p.inputs[value.name].shape
        for i in range(2 if value.name == "query" else len(dims)):
            dims[i].dim_param = ("batch", "sequence")[i] if value.name == "query" else f"{value.name}{i}"
        for i in (1, 3) if value.name.startswith("past") else (2,) if value.name == "query" else ():
            dims[i].dim_value = shape[i]
    assert session(made, native).get_outputs()[0].shape == ["batch", "sequence", 6 * 32]
    assert session(p.model(), native).get_outputs()[0].shape == [None] * 3


def test_a_call_counts(native: KernelLibrary) -> None:
    p = Problem(4, 2, 16, [9], 1, 16, 9)
    opened, before = session(p.model(), native), native.calls()
    for _ in range(3):
        opened.run(None, p.inputs)
    assert native.calls() == before + 3


# --- threads


@pytest.mark.parametrize(("lengths", "s"), [([300, 20, 310], 1), ([200, 300], 150)])
def test_threads_change_nothing(native: KernelLibrary, lengths: list[int], s: int) -> None:
    """Above the grain of attention.cpp, so that two threads do share the work."""
    lengths = [max(n, s) for n in lengths]
    p = Problem(9, 3, 64, lengths, s, 320, 320)
    for one, two in zip(p.run(native), p.run(native, threads=2), strict=True):
        np.testing.assert_array_equal(one, two)


def test_one_session_serves_many_threads(native: KernelLibrary) -> None:
    problems = [Problem(6, 2, 32, [s + 9, s + 80], s, 200, s + 80, seed=s) for s in (1, 3, 1, 40, 100, 1)]
    opened = session(problems[0].model(), native, threads=2)
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda p: opened.run(None, p.inputs), problems * 4))
    for p, outputs in zip(problems * 4, got, strict=True):
        p.close(outputs)


# --- extremes


@pytest.mark.parametrize("factor", [0.0, 1e-30, 30.0, 1e4, 1e8])
@pytest.mark.parametrize("s", [1, 80])
def test_scores_of_all_magnitudes(native: KernelLibrary, s: int, factor: float) -> None:
    """From uniform weights to one key that takes all: scores of 1e9 leave nothing to rounding but ties."""
    p = Problem(3, 1, 32, [s + 100], s, 190, s + 100)
    p.inputs["query"][:, :, : 3 * 32] *= np.float32(factor)
    # Scores are rounded at their own size, which moves weights by as much.
    error = 2e-6 + 32 * 2**-23 * min(factor, 100.0)
    for isa in instruction_sets(native):
        got = p.run(native, isa=isa)
        assert all(np.isfinite(x).all() for x in got)
        if factor <= 100.0:
            p.close(got, tolerance=error)
        else:
            # Whichever of nearly equal keys wins: heads lie within the values.
            values = got[2][:, 0, : p.lengths[0]]
            assert got[0].max() <= values.max() + 1e-5
            assert got[0].min() >= values.min() - 1e-5


@pytest.mark.parametrize("s", [1, 70])
def test_one_key_far_above_all_others(native: KernelLibrary, s: int) -> None:
    """The largest score comes first, last or between blocks: what is there already is scaled down to nothing."""
    for where in (0, 63, 64, 129):
        p = Problem(2, 1, 16, [130 + s], s, 210, 130 + s)
        p.inputs["cos"][:], p.inputs["sin"][:] = 1, 0
        p.inputs["query"][:, :, : 2 * 16] = 100
        p.inputs["past_key"][0, 0, where] = 50
        everywhere(native, p)
        got = p.run(native)
        np.testing.assert_allclose(got[0][0, 0, :16], p.inputs["past_value"][0, 0, where], atol=1e-6)


@pytest.mark.parametrize("s", [1, 40])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_numbers_show_and_stay_in_their_row(native: KernelLibrary, s: int, bad: float) -> None:
    p = Problem(4, 2, 16, [s + 10, s + 90, s + 30], s, 140, s + 90)
    clean = p.run(native)
    p.inputs["query"][1, 0, 3] = bad  # of the first query head
    for isa in instruction_sets(native):
        clean, got = replace(p).run(native, isa=isa), p.run(native, isa=isa)
        assert np.isnan(got[0][1, 0, :16]).all()
        rest = got[0].copy()
        rest[1, 0, :16] = clean[0][1, 0, :16]
        np.testing.assert_array_equal(rest, clean[0])
        for one, other in zip(got[1:], clean[1:], strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("s", [1, 40])
def test_a_bad_key_or_value_stays_in_its_row(native: KernelLibrary, s: int) -> None:
    for position in (4 * 16 + 1, 6 * 16 + 1):  # of the first key, of the first value
        for isa in instruction_sets(native):
            p = Problem(4, 2, 16, [s + 10, s + 90], s, 140, s + 90)
            clean = p.run(native, isa=isa)
            p.inputs["query"][1, -1, position] = np.nan
            got = p.run(native, isa=isa)
            assert np.isnan(got[0][1, -1, :32]).any()
            np.testing.assert_array_equal(got[0][0], clean[0][0])
            np.testing.assert_array_equal(got[0][1, :, 32:], clean[0][1, :, 32:])


GUARDED = """
import ctypes, mmap, sys
import numpy as np
from attention_problems import Problem
from native import require_kernels, session

keep = []

def guarded(array):
    "A copy that ends where memory ends: the page behind it may not be touched."
    pages = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + pages), mmap.PAGESIZE, 0) == 0
    copy = np.frombuffer(memory, array.dtype, array.size, pages - array.nbytes).reshape(array.shape)
    copy[...] = array
    keep.append(memory)
    return copy

native = require_kernels().on(sys.argv[1])
for lengths, s in (([20, 43], 1), ([20, 43], 3), ([90, 100], 70), ([5, 30], 30)):
    p = Problem(3, 1, 48, lengths, s, max(lengths), max(lengths))
    p.inputs["cos"], p.inputs["sin"] = p.inputs["cos"][: max(lengths)], p.inputs["sin"][: max(lengths)]
    got = p.run_in_place(session(p.model(), native), guarded)
    p.close(got, in_place=True)
print("within bounds")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is protected through mprotect")
def test_nothing_behind_a_buffer_is_touched(native: KernelLibrary) -> None:
    """In a process of its own, which would die of it."""
    for isa in instruction_sets(native):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HELPERS), *sys.path])}
        done = subprocess.run([sys.executable, "-c", GUARDED, isa], capture_output=True, text=True, env=environment)
        assert done.stdout == "within bounds\n", f"{isa}: status {done.returncode}, {done.stderr}"


# --- errors


def changed(p: Problem, **inputs: Any) -> dict[str, np.ndarray]:
    return p.inputs | inputs


def test_inputs_that_do_not_fit(native: KernelLibrary) -> None:
    """One line each, and the session goes on working."""
    p = Problem(4, 2, 16, [9, 30], 1, 40, 30)
    opened, before = session(p.model(), native), native.calls()
    x, past, f = p.inputs["query"], p.inputs["past_key"], np.float32
    for inputs, message in (
        ({"query": x[0]}, "query 0|Invalid rank|query has shape"),
        ({"query": x[:, :, 1:]}, r"query has shape \(2, 1, 127\), expected \(2, 1, 128\) for 4 and 2 heads of 16"),
        ({"query": x[:1]}, r"past_key has shape \(2, 2, 40, 16\), expected \(1, 2, tokens, a multiple of 16\)"),
        ({"past_key": past[:, :1]}, r"past_key has shape \(2, 1, 40, 16\)"),
        ({"past_key": past[..., :8], "past_value": past[..., :8]}, r"past_key has shape \(2, 2, 40, 8\)"),
        ({"past_key": past[..., :0], "past_value": past[..., :0]}, r"past_key has shape \(2, 2, 40, 0\)"),
        ({"past_value": past[:, :, 1:]}, r"past_value has shape \(2, 2, 39, 16\), expected \(2, 2, 40, 16\)"),
        ({"cos": p.inputs["cos"][:, 1:]}, r"cos has shape \(640, 7\), expected \(positions, 8\)"),
        ({"sin": p.inputs["sin"][1:]}, r"sin has shape \(639, 8\), expected \(positions, 8\)"),
        ({"last_positions": np.array([8], np.int32)}, r"last_positions has shape \(1,\), expected \(2,\)"),
        ({"last_positions": np.array([8, 30], np.int32)}, r"last_positions\[1\] is 30, expected 0 to 29"),
        ({"last_positions": np.array([-1, 29], np.int32)}, r"last_positions\[0\] is -1, expected 0 to 29"),
        ({"last_positions": np.array([-(2**31), 29], np.int32)}, r"last_positions\[0\] is -2147483648, expected 0"),
        ({"last_positions": np.array([2**31 - 1, 29], np.int32)}, r"last_positions\[0\] is 2147483647, expected 0"),
        ({"total_tokens": np.array(0, np.int32)}, "total_tokens is 0, expected 1 to 640"),
        ({"total_tokens": np.array(-5, np.int32)}, "total_tokens is -5, expected 1 to 640"),
        ({"total_tokens": np.array(2**31 - 1, np.int32)}, "total_tokens is 2147483647, expected 1 to 640"),
        (
            {"total_tokens": np.array(60, np.int32), "last_positions": np.array([8, 59], np.int32)},
            r"last_positions\[1\] is 59 with 1 new tokens, expected at most 40 tokens before them",
        ),
        (
            {"cos": np.ones((20, 8), f), "sin": np.ones((20, 8), f)},
            r"last_positions\[1\] is 29, expected 0 to 19 for 1 new tokens, total_tokens = 30 and 20 positions",
        ),
    ):
        with pytest.raises(Exception, match=message) as caught:
            opened.run(None, changed(p, **inputs))
        assert "\n" not in str(caught.value).strip()
    assert native.calls() == before
    p.close(opened.run(None, p.inputs))


def test_more_tokens_than_the_cache_has(native: KernelLibrary) -> None:
    """New tokens that do not fit past may come where present is larger."""
    p = Problem(4, 2, 16, [45], 10, 35, 45)
    p.close(p.run(native))
    with pytest.raises(Exception, match=r"total_tokens is 45, expected 46 to 640"):
        session(p.model(), native).run(None, changed(p, query=np.zeros((1, 46, 128), np.float32)))


def test_keys_without_values(native: KernelLibrary) -> None:
    p = Problem(4, 2, 16, [9], 1, 16, 9, packed=False)
    value = p.inputs.pop("value")
    with pytest.raises(Exception, match="value is missing, expected key and value, or neither"):
        session(p.model(), native).run(None, p.inputs)
    p.inputs["value"] = value[:, :, 1:]
    with pytest.raises(Exception, match=r"value has shape \(1, 1, 31\), expected \(1, 1, 32\)"):
        session(p.model(), native).run(None, p.inputs)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"num_heads": None}, "attribute num_heads is missing, expected the number of query heads"),
        ({"kv_num_heads": 0}, "attribute kv_num_heads is 0, expected at least 1"),
        ({"num_heads": 5}, "attribute num_heads is 5, expected a multiple of kv_num_heads = 2"),
        ({"scale": None}, "attribute scale is missing, expected the factor of the scores"),
        ({"local_window_size": 0}, "attribute local_window_size is 0, expected at least 1, or -1"),
        ({"local_window_size": -2}, "attribute local_window_size is -2, expected at least 1, or -1"),
    ],
)
def test_attributes_that_do_not_fit(native: KernelLibrary, attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=f"CachedAttention: {message}"):
        session(Problem(4, 2, 16, [9], 1, 16, 9).model(**attributes), native)


def test_without_a_window_all_tokens_are_seen(native: KernelLibrary) -> None:
    p = Problem(4, 2, 16, [9], 1, 16, 9)
    p.close(session(p.model(local_window_size=None), native).run(list(OUTPUTS), p.inputs))
