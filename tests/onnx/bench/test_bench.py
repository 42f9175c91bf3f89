"""The bench commands: who takes turns how, what is compared, what the tables and records say. No timing is asserted."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_binq.cli import main as cli
from lit_binq.errors import LitBinqError
from lit_binq_onnx.bench import candidate as candidates
from lit_binq_onnx.bench import ops
from lit_binq_onnx.bench.memory import UNKNOWN_CACHE, MemoryReader, buffer_bytes, cache_bytes
from lit_binq_onnx.bench.operators import (
    A4_ERROR,
    FLOAT_ERROR,
    INT8_ERROR,
    Kernel,
    Layer,
    binary_layer,
    float_layer,
    graph_of,
    grouped_layer,
    nbits_kernels,
    nbits_maker,
    our_kernels,
    planes_layer,
)
from lit_binq_onnx.bench.table import markdown, ops_tables, significant, spread
from lit_binq_onnx.bench.timing import Spread, alternate
from lit_binq_onnx.runtime.library import register
from native import require_native

MAKERS = {"binary": binary_layer, "planes": planes_layer, "grouped": grouped_layer}


# --- taking turns


def test_spread_is_median_and_quartiles():
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)
    assert Spread.of_rates(10, [1.0, 2.0, 5.0]) == Spread(5.0, 3.5, 7.5)


def test_contestants_take_turns_in_changing_order():
    log: list[str] = []

    def turn(name: str) -> Callable[[], None]:
        return lambda: log.append(name)

    seconds = alternate({name: turn(name) for name in "abc"}, rounds=3, warmup=1)
    assert [log[i : i + 3] for i in range(0, 12, 3)] == [list("abc"), list("acb"), list("cab"), list("cba")]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_the_clock_counts_unless_a_contestant_timed_itself():
    now = [0.0]

    def busy(seconds: float) -> Callable[[], None]:
        def run() -> None:
            now[0] += seconds

        return run

    seconds = alternate({"a": busy(2.0), "b": busy(3.0), "own": lambda: 0.5}, rounds=2, clock=lambda: now[0])
    assert seconds == {"a": [2.0, 2.0], "b": [3.0, 3.0], "own": [0.5, 0.5]}


# --- memory


def describe(folder: Path, cpu: int, index: int, **values: str) -> None:
    place = folder / f"cpu{cpu}" / "cache" / f"index{index}"
    place.mkdir(parents=True)
    for name, value in values.items():
        (place / name).write_text(value + "\n")


@pytest.mark.skipif(os.name != "posix" or not hasattr(os, "sched_getaffinity"), reason="Linux only")
def test_last_caches_that_threads_can_reach(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    for cpu, group in ((0, "0-1"), (1, "0-1"), (2, "2-3"), (3, "2-3"), (4, "4")):
        describe(tmp_path, cpu, 1, level="1", type="Instruction", size="64M", shared_cpu_list=str(cpu))
        describe(tmp_path, cpu, 2, level="2", type="Unified", size="512K", shared_cpu_list=str(cpu))
        describe(tmp_path, cpu, 3, level="3", type="Unified", size="8M", shared_cpu_list=group)
    assert cache_bytes(1, system=tmp_path) == (8 << 20, True)
    assert cache_bytes(2, system=tmp_path) == (16 << 20, True)
    assert cache_bytes(9, system=tmp_path) == (16 << 20, True)  # that of cpu 4 is not ours
    assert cache_bytes(1, system=tmp_path / "nowhere") == (UNKNOWN_CACHE, False)
    (tmp_path / "cpu0" / "cache" / "index3" / "size").write_text("many\n")
    assert cache_bytes(1, system=tmp_path) == (UNKNOWN_CACHE, False)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_reader_reads_every_byte(threads):
    reader = MemoryReader(threads, 100_003)
    try:
        reader.read()
        assert reader.cached_rate(times=1, bursts=1) > 0
        for place in (0, 33_334, 33_335, 50_000, 100_002):
            reader._buffer[place] = 0
            with pytest.raises(AssertionError):
                reader.read()
            reader._buffer[place] = 1
    finally:
        reader.close()


def test_the_buffer_is_larger_than_the_cache():
    assert buffer_bytes(1 << 20) == 64 << 20
    assert buffer_bytes(32 << 20) == 128 << 20
    assert buffer_bytes(1 << 40) == 1 << 30


# --- candidates and what they stand for


def relative(kernel: Kernel, M: int, K: int, N: int, copies: int = 2) -> float:
    """The error of a kernel's last copy on ONNX Runtime."""
    rng = np.random.default_rng(0)
    layers = [kernel.make(rng, K, N, i) for i in range(copies)]
    x = rng.standard_normal((M, K), np.float32)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    model = graph_of(layers, M, K, N).SerializeToString()
    if kernel.mode is not None:
        require_native()
        register(options, mode=kernel.mode)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    (y,) = session.run([f"y{copies - 1}"], {"x": x})
    return candidates.relative_error(y, x, layers[-1])


@settings(deadline=None, max_examples=15)
@given(kind=st.sampled_from(sorted(MAKERS)), M=st.integers(1, 9), K=st.integers(1, 300), N=st.integers(1, 40))
def test_our_layers_are_what_they_say(kind: str, M: int, K: int, N: int) -> None:
    """In exact mode, so that a wrong bit, scale or column shows."""
    assert relative(Kernel(kind, MAKERS[kind], FLOAT_ERROR, "exact"), M, K, N) < 1e-5


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("K", "block"), [(64, 32), (72, 64), (300, 128), (10, 32)])
def test_low_bit_layers_are_what_they_say(bits: int, K: int, block: int) -> None:
    """At accuracy 0 (float32) a code read in the wrong order shows; also where the block does not divide K."""
    assert relative(Kernel("n", nbits_maker(bits, block, 0), FLOAT_ERROR), 3, K, 24) < 1e-5
    # and at the accuracy that is timed it is int8's error, not less
    assert 1e-4 < relative(Kernel("n", nbits_maker(bits, block, 4), INT8_ERROR), 3, K, 24) < INT8_ERROR


def test_stored_bytes_are_those_of_the_format():
    rng = np.random.default_rng(0)
    K, N = 256, 64
    assert binary_layer(rng, K, N, 0).stored_bytes == N * K // 8 + 2 * N + 2 * K
    assert grouped_layer(rng, K, N, 0).stored_bytes == N * K // 8 + 2 * N * 2
    assert float_layer(rng, K, N, 0).stored_bytes == 4 * N * K
    for bits in (2, 4, 8):
        assert nbits_maker(bits, 32, 4)(rng, K, N, 0).stored_bytes == N * K * bits // 8 + 4 * N * 8


def test_relative_error_sees_one_wrong_weight():
    rng = np.random.default_rng(0)
    layer = float_layer(rng, 64, 2000, 0)  # more rows than are compared at once
    W = layer.tensors["w0"]
    x = rng.standard_normal((20, 64), np.float32)
    assert candidates.relative_error(x @ W, x, layer) < 1e-6
    for row in (0, 19):  # the first and the last row of x are looked at
        y = x @ W
        y[row, 1999] += 50
        assert candidates.relative_error(y, x, layer) > 1e-3
    assert math.isnan(candidates.relative_error(np.full((20, 2000), np.nan, np.float32), x, layer))


@settings(deadline=None)
@given(size=st.integers(1, 1 << 32), cache=st.integers(1, 1 << 32), M=st.integers(1, 4096))
def test_copies_are_enough_and_not_too_many(size: int, cache: int, M: int) -> None:
    copies = candidates.copies_for(size, cache, M)
    assert copies >= 1
    assert copies == 1 or copies * size <= candidates.MOST_BYTES
    assert copies == 1 or copies * M <= max(candidates.MOST_ROWS, 2 * M)
    if size * copies < candidates.ROTATION * cache:  # only a limit makes them too few
        assert (copies + 1) * size > candidates.MOST_BYTES or copies + 1 > max(2, candidates.MOST_ROWS // M)


# --- the run


@pytest.mark.slow
def test_a_small_run_times_everyone_with_every_number_of_threads(monkeypatch):
    monkeypatch.setattr(ops, "PAUSE", 0.0)
    require_native()
    shapes = [ops.Shape(1, 256, 64), ops.Shape(3, 64, 40)]
    result = ops.bench_ops(shapes, threads=[1, 2], rounds=2, cache=1 << 12)
    ours = {kernel.name for kernel in our_kernels()}
    names = ours | {"ort-fp32", "ort-8bit", "ort-4bit", "ort-2bit", "ort-2bit-lut"}
    for threads in (1, 2):
        first, second = ([r for r in result.records if r.threads == threads and r.K == K] for K in (256, 64))
        assert {r.kernel for r in first} == names
        assert {r.kernel for r in second} == names - {"lit-binq-grouped"}  # timed at M = 1 only
        for r in (*first, *second):
            if r.kernel == "ort-2bit-lut" and r.ms is None:
                assert "not there" in r.note  # too small for it: the runtime multiplies in float32 and does not say so
                continue
            assert r.ms_low <= r.ms <= r.ms_high
            base = next(s.ms for s in result.records if (s.K, s.threads, s.kernel) == (r.K, threads, "ort-fp32"))
            assert r.ratio_to_fp32 == pytest.approx(base / r.ms)
            assert r.gbytes_per_s == pytest.approx(r.packed_bytes / r.ms / 1e6)
            assert r.share_of_read == pytest.approx(r.gbytes_per_s / r.read_gbytes_per_s)
            exact = r.kernel in ("ort-fp32", "lit-binq-exact")
            assert r.error < (1e-5 if exact else A4_ERROR if r.kernel == "lit-binq-a4" else INT8_ERROR)
            assert (r.block > 0) == ("bit" in r.kernel)
            assert r.rounds == 2
            assert r.copies * r.packed_bytes >= candidates.ROTATION << 12 or r.copies == candidates.MOST_ROWS // r.M
            if r.block and r.kernel not in ours:
                assert f"block {r.block}: " in r.note  # what was tried
    text = ops_tables(result)
    assert text.count("### M = ") == 4
    assert all(f"| {name}" in text for name in names)


def test_who_is_wrong_or_refused_is_listed_and_not_timed(monkeypatch):
    def lying(rng: np.random.Generator, K: int, N: int, copy: int) -> Layer:
        layer = float_layer(rng, K, N, copy)
        return Layer(layer.nodes, layer.tensors, lambda n: layer.dense(n) * 1.1)

    def unknown(rng: np.random.Generator, K: int, N: int, copy: int) -> Layer:
        layer = float_layer(rng, K, N, copy)
        layer.nodes[0].op_type = "MatMulWithoutMeaning"
        return layer

    families = [
        [Kernel("liar", lying, FLOAT_ERROR)],
        [Kernel("unknown", unknown, FLOAT_ERROR)],
        [Kernel("silent", float_layer, FLOAT_ERROR, smallest_error=1e-5)],  # quietly takes the float kernel
        [Kernel("both", unknown, 1.0, block=1), Kernel("both", float_layer, 1.0, block=2)],
    ]
    monkeypatch.setattr(ops, "nbits_kernels", lambda K: families)
    monkeypatch.setattr(ops, "library_path", lambda: None)
    records = ops.bench_ops([ops.Shape(1, 16, 8)], threads=[1], rounds=1, cache=100).records
    found = {r.kernel: r for r in records}
    assert found["ort-fp32"].ms is not None
    for name, words in (("liar", "wrong: errs by"), ("unknown", "refused"), ("silent", "not there")):
        assert (found[name].ms, words in found[name].note) == (None, True)
    assert found["both"].block == 2
    assert "block 1 refused" in found["both"].note
    assert all("not built" in found[kernel.name].note for kernel in our_kernels())  # no library: said, not dropped
    assert "| liar | - |" in ops_tables(ops.OpsResult(records, 100))


def test_low_bit_candidates_cover_the_blocks():
    for K, blocks in ((4096, {32, 128}), (576, {32, 64, 128})):
        families = nbits_kernels(K)
        assert [family[0].name for family in families] == ["ort-8bit", "ort-4bit", "ort-2bit", "ort-2bit-lut"]
        assert all({kernel.block for kernel in family} == blocks for family in families)


# --- tables


def test_markdown_escapes_bars_and_aligns():
    assert markdown(["a", "b"], [["x|y", "1"]]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |"


@given(value=st.floats(1e-6, 1e9))
def test_significant_digits(value: float) -> None:
    text = significant(value)
    assert float(text) == pytest.approx(value, rel=0.006)
    assert len(text.split("e")[0].replace(".", "").lstrip("0").rstrip("0")) <= 3


def test_what_is_absent_is_a_dash():
    assert significant(None) == spread(None, None, None) == "-"
    assert significant(0.0) == "0"
    assert [significant(v) for v in (0.0285, 0.9999, 12345.0, 1.0)] == ["0.0285", "1.00", "12300", "1.00"]
    assert spread(2.0, 1.0, 3.0) == "2.00 (1.00 to 3.00)"


# --- the command


@pytest.mark.slow
def test_bench_ops_prints_a_table_and_writes_records(tmp_path, capsys):
    out = tmp_path / "ops.json"
    arguments = ["--shapes", "512x1024", "--M", "1,2", "--rounds", "1", "--cache_mb", "1", "--json", str(out)]
    assert cli.main(["bench", "ops", *arguments]) == 0
    assert "| lit-binq-lut |" in capsys.readouterr().out
    records = json.loads(out.read_text())
    keys = {"kernel", "M", "K", "N", "threads", "ms", "ms_low", "ms_high", "ratio_to_fp32", "packed_bytes"}
    assert all(keys | {"gbytes_per_s", "error"} <= record.keys() for record in records)
    assert {(r["M"], r["K"], r["N"]) for r in records} == {(1, 512, 1024), (2, 512, 1024)}


def test_bench_ops_of_some_kernels(tmp_path, capsys):
    out = tmp_path / "ops.json"
    arguments = ["--shapes", "64x96", "--M", "1", "--rounds", "1", "--cache_mb", "1", "--json", str(out)]
    assert cli.main(["bench", "ops", *arguments, "--kernels", "lit-binq-lut,ort-4bit"]) == 0
    assert [record["kernel"] for record in json.loads(out.read_text())] == ["ort-4bit", "lit-binq-lut"]
    assert "| ort-4bit, block " in capsys.readouterr().out  # fp32 is not needed for a table


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shapes", "64"], ["'64'", "--shapes"]),
        (["--shapes", "0x64"], ["0x64", "from 1"]),
        (["--M", "one"], ["'one'", "--M"]),
        (["--M", "0"], ["M 0", "from 1"]),
        (["--threads", "0"], ["threads", "0"]),
        (["--threads", "1;2"], ["'1;2'", "--threads"]),
        (["--rounds", "0"], ["rounds", "0"]),
        (["--cache_mb", "-1"], ["cache_mb", "-1"]),
        (["--kernels", "ort-fp32,lut"], ["got 'lut',", "lit-binq-lut"]),
    ],
)
def test_wrong_options_of_ops_are_one_line(arguments, words, tmp_path, capsys):
    out = tmp_path / "ops.json"
    assert cli.main(["bench", "ops", *arguments, "--json", str(out)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("litbinq bench ops: error: ")
    assert err.count("\n") == 1
    assert [word for word in words if word not in err] == []
    assert not out.exists()


def test_help_and_wrong_words(capsys):
    assert cli.main(["bench", "--help"]) == 0
    text = capsys.readouterr().out
    words = ("ops", "decode OUT", "prefill OUT", "shape MODEL", "perplexity OUT")
    assert all(f"\n  bench {word}" in text for word in words)
    assert cli.main(["bench"]) == 2
    assert cli.main(["bench", "opps"]) == 2
    assert "'opps', expected one of ops, decode, prefill, shape, perplexity" in capsys.readouterr().err
    for word in ("ops", "decode", "prefill", "shape", "perplexity"):
        with pytest.raises(SystemExit) as stop:
            cli.main(["bench", word, "--help"])
        assert stop.value.code == 0
    assert cli.main(["--help"]) == 0
    assert "\n  bench " in capsys.readouterr().out


def test_shapes_are_all_pairs():
    assert ops.shapes_of("2x3,4X5", "1,7") == [ops.Shape(m, k, n) for k, n in ((2, 3), (4, 5)) for m in (1, 7)]
    with pytest.raises(LitBinqError):
        ops.shapes_of("2x3x4", "1")
