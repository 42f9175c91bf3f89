"""Memory that is given back: only pages that still equal their file, and running goes on with the same numbers."""

import ctypes
import json
import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import byte_tokenizer
from exporting import fusable_model

from lit_binq_onnx.export import export_onnx
from lit_binq_onnx.resident import Pages, mappings, trim_heap
from lit_binq_onnx.session import OnnxModel

linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's account of a process is Linux's")


def resident(file: Path) -> int:
    """KiB of a file's mappings that are resident."""
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith("Rss:"):
            total += int(line.split()[1]) if counts else 0
        elif "-" in line.split(" ")[0]:
            counts = line.endswith(str(file))
    return total


@linux
def test_pages_that_were_read_go_and_come_back(tmp_path: Path) -> None:
    file = tmp_path / "some tensors.data"  # a space, as paths may have
    content = np.random.default_rng(0).bytes(1 << 20)
    file.write_bytes(content)
    with open(file, "rb") as handle:
        view = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
    assert view[:] == content
    assert resident(file) == 1 << 10
    pages, by_folder = Pages(file), Pages(tmp_path)
    assert pages.mappings == by_folder.mappings
    assert [length for _, length in pages.mappings] == [1 << 20]
    pages.release()
    assert resident(file) == 0
    assert view[:] == content
    view[5:6] = b"x"  # private: the file keeps its byte, this process must not lose its own
    changed = Pages(file)
    assert changed.mappings == []
    changed.release()
    assert view[5:6] == b"x"
    view.close()


@linux
def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("a/data", "ab"):
        (tmp_path / name).write_bytes(bytes(4096))
    with open(tmp_path / "ab", "rb") as handle:
        view = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        assert view[0] == 0
        assert Pages(tmp_path / "a", tmp_path / "a/data").mappings == []
        assert len(Pages(tmp_path / "ab").mappings) == 1
    view.close()


@linux
def test_memory_that_took_a_mappings_place_is_left_alone(tmp_path: Path) -> None:
    """What a second session finds mapped may be the first one's, which ends before it."""
    size = 1 << 16
    (tmp_path / "data").write_bytes(bytes(size))
    with open(tmp_path / "data", "rb") as handle:
        view = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
    pages = Pages(tmp_path / "data")
    ((start, length),) = pages.mappings
    view.close()
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    assert libc.mmap(start, length, mmap.PROT_READ | mmap.PROT_WRITE, private, -1, 0) == start
    memory = (ctypes.c_char * size).from_address(start)
    memory[:] = b"x" * size
    pages.release()
    assert memory[:] == b"x" * size
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    assert libc.munmap(start, length) == 0


def test_no_account_no_release(tmp_path: Path) -> None:
    assert mappings([tmp_path], tmp_path / "nowhere") == {}
    Pages(tmp_path / "nowhere").release()
    trim_heap()


def test_a_released_model_computes_the_same(tmp_path: Path) -> None:
    """Both routes, and a prompt read twice: its pages are given back after the first time."""
    export_onnx(fusable_model("llama"), byte_tokenizer(), tmp_path / "out", check=False, head_bits=8)
    ids = np.arange(12)[None] + 60
    for route in ("fused", "generic"):
        model = OnnxModel(tmp_path / "out", native=False, threads=1, route=route)  # type: ignore[arg-type]  # a Literal
        first, again = (
            model.forward(ids, np.ones((1, 12)), np.arange(12)[None], model.empty_past(1, 20), last_only=True)[0]
            for _ in range(2)
        )
        np.testing.assert_array_equal(first, again)
        model._pages.release()
        whole = model.forward(ids, np.ones((1, 12)), np.arange(12)[None], model.empty_past(1, 20))[0]
        np.testing.assert_allclose(whole[:, -1], first[:, 0], rtol=1e-4, atol=1e-5)


def test_running_imports_little() -> None:
    """Opening and generating need neither onnx nor torch nor transformers: 13 MB and more."""
    code = (
        "import json, sys, lit_binq_onnx.session, lit_binq_onnx.generate, lit_binq.bench_engines; "
        "print(json.dumps([m for m in ('onnx', 'torch', 'transformers', 'onnx_ir') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
