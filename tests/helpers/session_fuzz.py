"""Random models of one operator, most of them damaged, through real sessions of ONNX Runtime.

    python tests/helpers/session_fuzz.py --count 2000 --seed 1      (the Makefile has the environment for a library
    built with
                                                             sanitizers: `make fuzz`)

One execution is one session created or refused and, where it was created, run. A fault may end the process (that is
what sanitizers do), never pass for a result: models to which nothing was done must run and give what float64 gives.
Execution i has the seed `--seed` + i, so that `--count 1` repeats it; the file named by `--last` holds the current one.
"""

import argparse
import collections
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

import fused_problems as fused
import grouped_problems as grouped
import nbits_problems as nbits
import two_plane_problems as two_plane
from attention_problems import Problem as Attention
from lit_binq_onnx.runtime.library import MODE_ENTRY, library_path
from native import one_node_model, random_problem

Arrays = dict[str, np.ndarray]
Check = Callable[[list[np.ndarray], bool], None]

ENDS = [2**63 - 1, 2**63 - 8, -(2**63), 2**31 - 1, 2**31, 2**32, 2**40, 2**47, 2**62, -1, 0, 1, 2, 3, 4, 8, 16, 256]
TYPES = [TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT8, TensorProto.INT32, TensorProto.INT64,
         TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BOOL]  # fmt: skip


@dataclass
class Case:
    """A model, what to feed it, and a check of its results in exact mode or not."""

    model: onnx.ModelProto
    feeds: Arrays
    check: Check


def near(got: np.ndarray, want: np.ndarray, size: np.ndarray, exact: bool) -> None:
    """Within what sums of float32, or tables of bytes, may err. size: sum of the magnitudes of what is added up."""
    assert got.shape == want.shape, (got.shape, want.shape)
    error = np.abs(got - want)
    assert (error <= (2e-5 if exact else 0.08) * size + 1e-30).all(), float((error / (size + 1e-30)).max())


def pick(rng: np.random.Generator, *values: int) -> int:
    return int(values[rng.integers(len(values))])


def sizes(rng: np.random.Generator) -> tuple[int, int, int, int]:
    """M, N, K and a seed."""
    K = pick(rng, 1, 7, 8, 9, 31, 64, 65, 160, 161, 257, int(rng.integers(1, 300)))
    return (
        int(rng.integers(1, 6)),
        pick(rng, 1, 31, 32, 33, 129, int(rng.integers(1, 150))),
        K,
        int(rng.integers(1 << 30)),
    )


def binary(rng: np.random.Generator) -> Case:
    M, N, K, seed = sizes(rng)
    p, x = random_problem(N, K, bias=bool(rng.integers(2)), seed=seed), grouped.activations(M, K, seed)
    return Case(
        one_node_model(p, ["M", K]),
        {"X": x},
        lambda y, exact: near(y[0], p.reference(x), p.magnitude(x), exact),
    )


def groups(rng: np.random.Generator) -> Case:
    M, N, K, seed = sizes(rng)
    group, bias = pick(rng, 1, 8, 24, 128, K, 3 * K), bool(rng.integers(2))
    p = grouped.grouped(N, K, group, bias=bias, seed=seed)
    x = grouped.activations(M, K, seed)
    return Case(
        grouped.one_node(p), {"X": x}, lambda y, exact: near(y[0], p.reference(x), p.magnitude(x) + 1e-6, exact)
    )


def two_planes(rng: np.random.Generator) -> Case:
    M, N, K, seed = sizes(rng)
    bits = pick(rng, 0, 4, 8)
    outliers = int(rng.integers(K + 1)) if rng.integers(2) else 0
    p = two_plane.problem(
        N, K, L=2 + int(rng.integers(3)), group=pick(rng, 1, 16, 24, 144, K, 2 * K), bits=bits, outliers=outliers,
        static=bool(bits and rng.integers(2)), bias=bool(rng.integers(2)), seed=seed,
    )  # fmt: skip
    x = two_plane.activations(M, K, seed)
    return Case(
        two_plane.model(p, ["M", K]),
        {"X": x},
        lambda y, exact: near(y[0], p.reference(x), p.magnitude(x) + 1e-6, exact or bits != 0),
    )


def rounded(rng: np.random.Generator) -> Case:
    M, N, K, seed = sizes(rng)
    p = nbits.problem(
        N, K, bits=pick(rng, 4, 8), g=pick(rng, 16, 32, 64, 128, 256), zeros=bool(rng.integers(2)), seed=seed
    )
    x = grouped.activations(M, K, seed)
    flat = bool(rng.integers(2))
    return Case(
        nbits.one_node_model(p, ["M", K], flat=flat),
        {"X": x},
        lambda y, exact: near(y[0], p.reference(x), p.magnitude(x), exact),
    )


def fused_kinds(rng: np.random.Generator) -> Case:
    M, N, K, seed = sizes(rng)
    hidden = fused.activations(M, K, seed=seed)
    feeds = fused.feeds(hidden)
    weight = fused.gamma(K).astype(np.float64)
    x = fused.float64_norm((hidden + feeds["skip"]).astype(np.float64), weight, fused.EPSILON)
    if rng.integers(2):
        shape = (N, pick(rng, 1, 32, 40), pick(rng, 1, 16, 33))
        problems = fused.attention(shape, K, bias=bool(rng.integers(2)), seed=seed)
        want = np.concatenate([p.reference(x) for p in problems], 1)
        size = np.concatenate([p.magnitude(x) for p in problems], 1)
        made = fused.model("NormBinaryMatMulQKV", problems, ["M", K])
        return Case(made, feeds, lambda y, exact: near(y[0], want, size, exact))
    gate, up, down = problems = fused.mlp(K, pick(rng, 1, 24, 130), N, seed=seed)
    opened, z = gate.reference(x), up.reference(x)
    slack = gate.magnitude(x) * np.abs(z) + up.magnitude(x) * np.abs(opened) + gate.magnitude(x) * up.magnitude(x)
    opened = opened / (1 + np.exp(-np.clip(opened, -700, 700))) * z
    size = np.abs(slack * down.c.astype(np.float64)).sum(1, keepdims=True) * np.abs(down.r.astype(np.float64))
    made = fused.model("NormBinaryGatedMLP", problems, ["M", K])
    return Case(made, feeds, lambda y, exact: near(y[0], down.reference(opened), size, exact))


def attention(rng: np.random.Generator) -> Case:
    k, s, past = int(rng.integers(1, 3)), pick(rng, 1, 1, 5, 66), pick(rng, 0, 3, 40)
    rows = int(rng.integers(1, 3))
    lengths = [s + past if past else int(rng.integers(1, s + 1)) for _ in range(rows)]
    lengths[0] = s + past
    p = Attention(
        k * int(rng.integers(1, 4)), k, 16 * int(rng.integers(1, 4)), lengths, s, past + pick(rng, 0, 7, 100), s + past,
        window=pick(rng, -1, 1, 9, 64), packed=bool(rng.integers(2)), seed=int(rng.integers(1 << 30)),
    )  # fmt: skip

    def check(y: list[np.ndarray], exact: bool) -> None:
        for got, want in zip(y, p.reference(), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

    return Case(p.model(), dict(p.inputs), check)


KINDS = (binary, groups, two_planes, rounded, fused_kinds, attention)


def damage_attribute(rng: np.random.Generator, case: Case) -> None:
    node = case.model.graph.node[0]
    names = sorted(a.name for a in node.attribute) + ["exact"]
    name = names[rng.integers(len(names))]
    old = next((a.i for a in node.attribute if a.name == name), 0)
    for attribute in [a for a in node.attribute if a.name == name]:
        node.attribute.remove(attribute)
    what = rng.integers(8)
    if what == 0:
        return
    if what == 1:
        values: list[object] = [float("nan"), float("inf"), -1.0, 1e38, "text", [1, 2], 0.0]
        node.attribute.append(helper.make_attribute(name, values[rng.integers(len(values))]))
        return
    value = [ENDS[rng.integers(len(ENDS))], old + int(rng.integers(-8, 9)), old * 2, int(rng.integers(-(2**63), 2**63))]
    chosen = value[rng.integers(4)]
    node.attribute.append(helper.make_attribute(name, max(-(2**63), min(2**63 - 1, chosen))))


def damage_tensor(rng: np.random.Generator, case: Case) -> None:
    tensors = case.model.graph.initializer
    if not len(tensors):
        return damage_feed(rng, case)
    t = tensors[rng.integers(len(tensors))]
    what = rng.integers(7)
    if what == 0:  # bytes of all kinds: NaN, infinities, padding
        raw = bytearray(t.raw_data)
        for _ in range(min(len(raw), int(rng.integers(1, 9)))):
            raw[rng.integers(len(raw))] = pick(rng, 0, 255, 127, int(rng.integers(256)))
        t.raw_data = bytes(raw)
    elif what == 1:
        t.raw_data = t.raw_data[: int(rng.integers(len(t.raw_data) + 1))]
    elif what == 2:
        t.raw_data = t.raw_data + bytes(int(rng.integers(1, 300)))
    elif what == 3:
        t.data_type = TYPES[rng.integers(len(TYPES))]
    else:  # a shape with as much data as it says, where that is not too much
        if what == 4 and len(t.dims):
            i = rng.integers(len(t.dims))
            t.dims[i] = max(
                0, [t.dims[i] + int(rng.integers(-2, 3)), 0, ENDS[rng.integers(len(ENDS))]][rng.integers(3)]
            )
            if rng.integers(2):
                t.dims[rng.integers(len(t.dims))] = 0
        elif what == 5:
            t.dims.insert(0, pick(rng, 0, 1, 2))
        elif len(t.dims):
            del t.dims[rng.integers(len(t.dims))]
        size = onnx.helper.tensor_dtype_to_np_dtype(t.data_type).itemsize
        elements = 0 if 0 in t.dims else int(np.prod([float(d) for d in t.dims]))
        if elements * size < 1 << 20:
            t.raw_data = (t.raw_data * (elements * size // max(1, len(t.raw_data)) + 1))[: elements * size]


def damage_inputs(rng: np.random.Generator, case: Case) -> None:
    node, graph = case.model.graph.node[0], case.model.graph
    i = int(rng.integers(len(node.input)))
    what = rng.integers(5)
    if what == 0:
        node.input[i] = ""
    elif what == 1:
        del node.input[i:]
    elif what == 2:  # computed, or given by the caller
        name = node.input[i]
        found = [t for t in graph.initializer if t.name == name]
        if found:
            array = onnx.numpy_helper.to_array(found[0])
            graph.initializer.remove(found[0])
            graph.input.append(helper.make_tensor_value_info(name, found[0].data_type, array.shape))
            case.feeds[name] = array
    elif what == 3:
        node.input[i], node.input[0] = node.input[0], node.input[i]
    else:
        node.input.append(node.input[i])


def damage_feed(rng: np.random.Generator, case: Case) -> None:
    names = sorted(case.feeds)
    name = names[rng.integers(len(names))]
    x = case.feeds[name]
    what = rng.integers(5)
    for info in case.model.graph.input:  # the shape that the graph declares must not hide ours
        if info.name == name:
            info.type.tensor_type.ClearField("shape")
    if what == 0 and x.size:
        x = x.copy()
        flat = x.reshape(-1)
        ends = (
            [np.iinfo(x.dtype).max, np.iinfo(x.dtype).min, -1, 0] if x.dtype.kind in "iu" else [np.nan, np.inf, 3e38, 0]
        )
        flat[rng.integers(len(flat))] = ends[rng.integers(4)]
    elif what == 1:
        x = x[None] if rng.integers(2) else x.reshape(-1)
    elif what == 2 and x.ndim:
        axis = int(rng.integers(x.ndim))
        x = np.ascontiguousarray(np.take(x, range(max(0, x.shape[axis] - 1)), axis))
    elif what == 3 and x.ndim:
        x = np.zeros([0 if rng.integers(2) else n for n in x.shape], x.dtype)
    else:
        x = np.concatenate([x, x], int(rng.integers(x.ndim))) if x.ndim else x
    case.feeds[name] = x


def damage_shape(rng: np.random.Generator, case: Case) -> None:
    """What the graph declares of an input, which shape inference believes."""
    graph = case.model.graph
    info = graph.input[rng.integers(len(graph.input))]
    dims = info.type.tensor_type.shape.dim
    if rng.integers(4) == 0 or not len(dims):
        info.type.tensor_type.ClearField("shape")
        return
    d = dims[rng.integers(len(dims))]
    if rng.integers(2):
        d.dim_param = "m"
    else:
        d.dim_value = ENDS[rng.integers(len(ENDS))]


DAMAGE = (damage_attribute, damage_attribute, damage_tensor, damage_tensor, damage_inputs, damage_feed, damage_shape)


def execute(seed: int, library: str, counts: collections.Counter[str]) -> None:
    """One execution."""
    rng = np.random.default_rng(seed)
    make = KINDS[rng.integers(len(KINDS))]
    case = make(rng)
    faults = 0 if rng.integers(4) == 0 else 1 if rng.integers(2) else int(rng.integers(2, 5))
    for _ in range(faults):
        with contextlib.suppress(ValueError, IndexError):  # what is damaged already may not bear more of it
            DAMAGE[rng.integers(len(DAMAGE))](rng, case)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # memory of exact sizes, for the sanitizer
    mode = ("lut", "exact")[rng.integers(2)]
    options.add_session_config_entry(MODE_ENTRY, mode)
    options.register_custom_ops_library(library)
    counts["executions"] += 1
    try:
        session = ort.InferenceSession(case.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        counts["created"] += 1
        outputs = session.run(None, case.feeds)
        counts["ran"] += 1
    except Exception:
        if faults == 0:
            raise
        return
    if faults == 0:
        with np.errstate(over="ignore", invalid="ignore"):
            case.check(outputs, mode == "exact")
        counts["compared with float64"] += 1


def main() -> None:
    """Run the executions that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--last", type=Path, help="a file that takes the seed of the execution that is going on")
    arguments = parser.parse_args()
    library, counts, began = library_path(), collections.Counter[str](), time.monotonic()
    assert library is not None, "no native library"
    for seed in range(arguments.seed, arguments.seed + arguments.count):
        if arguments.last is not None:
            arguments.last.write_text(str(seed))
        try:
            execute(seed, str(library), counts)
        except BaseException:
            print(f"session_fuzz: fails at --seed {seed} --count 1", flush=True)
            raise
        if counts["executions"] % 5000 == 0:
            print(dict(counts), f"{time.monotonic() - began:.0f} s", flush=True)
    print(dict(counts), f"{time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
