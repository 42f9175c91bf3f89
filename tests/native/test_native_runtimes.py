"""Two copies of ONNX Runtime in one process, and runtimes that word their messages otherwise."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from conftest import HELPERS

from lit_binq_onnx.runtime.library import NativeLibrary
from native import one_node_model, random_problem, require_native
from second_runtime import CREATE_OPTIONS, Runtime, runtime_library

OTHER = "LIT_BINQ_OTHER_RUNTIME"
"""Names the shared library of another version of ONNX Runtime, for the slow test."""


@pytest.fixture(scope="module")
def native() -> NativeLibrary:
    return require_native()


@pytest.fixture(scope="module")
def copy() -> Path:
    found = runtime_library(Path(ort.__file__).parent)
    if found is None:
        pytest.skip("this package of onnxruntime carries no shared library beside its Python module")
    return found


def run_beside(native: NativeLibrary, runtime: Path, tmp_path: Path) -> dict[str, object]:
    """What `second_runtime` prints, in a process of its own."""
    model = tmp_path / "model.onnx"
    model.write_bytes(one_node_model(random_problem(100, 300), ["M", 300]).SerializeToString())
    script = HELPERS / "second_runtime.py"
    command = [sys.executable, str(script), str(native.path), str(runtime), str(model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
    facts: dict[str, object] = json.loads(done.stdout)
    return facts


def test_two_copies_in_one_process(native: NativeLibrary, copy: Path, tmp_path: Path) -> None:
    """The Python module and the shared library of its package: two copies, each calls its own functions."""
    facts = run_beside(native, copy, tmp_path)
    assert facts == {"first": ort.__version__, "second": ort.__version__, "equal": [True] * 4, "calls": 8}


@pytest.mark.slow
def test_two_versions_in_one_process(native: NativeLibrary, tmp_path: Path) -> None:
    if not os.environ.get(OTHER):
        pytest.skip(f"{OTHER} names no shared library of another ONNX Runtime")
    facts = run_beside(native, Path(os.environ[OTHER]), tmp_path)
    assert facts["second"] != ort.__version__
    assert (facts["equal"], facts["calls"]) == ([True] * 4, 8)


class Base(ctypes.Structure):
    """OrtApiBase."""

    _fields_ = (("GetApi", ctypes.c_void_p), ("GetVersionString", ctypes.c_void_p))


def test_no_text_of_the_runtime_matters(native: NativeLibrary, copy: Path) -> None:
    """The real runtime, but for a version string, build information and error messages of other words."""
    real = Runtime(copy)
    table = (ctypes.c_void_p * 300).from_buffer_copy((ctypes.c_char * 2400).from_address(real.table))
    text = ctypes.create_string_buffer(b"Nightly build of the year 2031")
    build = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(text))
    failing = ctypes.CFUNCTYPE(ctypes.c_void_p, *[ctypes.c_void_p] * 5)(
        lambda *_: ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(real.entry(0))(
            6, b"no such context"
        )
    )
    table[254] = ctypes.cast(build, ctypes.c_void_p)
    table[274] = ctypes.cast(failing, ctypes.c_void_p)
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(lambda version: ctypes.addressof(table))
    base = Base(ctypes.cast(get_api, ctypes.c_void_p), ctypes.cast(build, ctypes.c_void_p))
    real.register(native.handle, real.made(CREATE_OPTIONS), ctypes.addressof(base))
    # The library keeps the base and the table for the life of the process.
    native.keep = (table, text, build, failing, get_api, base)  # type: ignore[attr-defined]  # and so does this


def test_the_copy_computes_what_the_module_does(native: NativeLibrary, copy: Path) -> None:
    """The exact mode of a node too, in this process."""
    p, x = random_problem(40, 64), np.ones((2, 64), np.float32)
    content = one_node_model(p, [2, 64], exact=1).SerializeToString()
    y = Runtime(copy).run(native.handle, content, x, (2, 40))
    np.testing.assert_allclose(y, p.reference(x), rtol=1e-5, atol=1e-5)
