"""The mode of the kernels belongs to a session: its configuration says it, and no other session hears of it."""

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from conftest import HELPERS, byte_tokenizer

from exporting import fusable_model
from lit_binq_onnx.build.export import export_onnx
from lit_binq_onnx.runtime.errors import RunError
from lit_binq_onnx.runtime.library import MODE_ENTRY, Mode, NativeLibrary, register
from lit_binq_onnx.runtime.session import OnnxModel
from native import one_node_model, random_problem, require_native, session

MODES: tuple[Mode, ...] = ("lut", "exact")


@pytest.fixture(scope="module")
def native() -> NativeLibrary:
    return require_native()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a rounded head, which follows the mode too."""
    out = tmp_path_factory.mktemp("modes") / "out"
    export_onnx(fusable_model("llama"), byte_tokenizer(), out, check=False, head_bits=8)
    return out


def logits(folder: Path, mode: Mode) -> np.ndarray:
    model = OnnxModel(folder, native=True, mode=mode, threads=1)
    return model.forward(np.arange(9)[None] + 60, np.ones((1, 9)), np.arange(9)[None], model.empty_past())[0]


@pytest.mark.slow
def test_threads_that_open_sessions_get_their_own_mode(native: NativeLibrary, exported: Path) -> None:
    """Two threads, each 25 sessions of its mode, opened in the same moments: told apart by what they compute."""
    want = {mode: logits(exported, mode) for mode in MODES}
    assert not np.array_equal(want["lut"], want["exact"])
    barrier = threading.Barrier(2)
    wrong: dict[str, list[int]] = {mode: [] for mode in MODES}

    def open_many(mode: Mode) -> None:
        for i in range(25):
            barrier.wait(60)
            if not np.array_equal(logits(exported, mode), want[mode]):
                wrong[mode].append(i)

    threads = [threading.Thread(target=open_many, args=(mode,)) for mode in MODES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == {"lut": [], "exact": []}


@pytest.mark.slow
def test_a_native_session_reads_the_file_itself(
    native: NativeLibrary, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No rewritten bytes: what ONNX Runtime opens is the path, in either mode."""
    opened: list[object] = []

    class Session(ort.InferenceSession):
        def __init__(self, source: object, *arguments: object, **options: object) -> None:
            opened.append(source)
            super().__init__(source, *arguments, **options)

    monkeypatch.setattr(ort, "InferenceSession", Session)
    for mode in MODES:
        OnnxModel(exported, native=True, mode=mode, threads=1)
    assert [isinstance(source, Path) for source in opened] == [True, True]


def test_register_takes_a_mode(native: NativeLibrary) -> None:
    p, x = random_problem(100, 300), np.random.default_rng(0).standard_normal((2, 300)).astype(np.float32)
    model = one_node_model(p, [2, 300])
    want = {mode: session(model, native, mode=mode).run(None, {"X": x})[0] for mode in MODES}
    for mode in (*MODES, None):
        options = ort.SessionOptions()
        assert register(options, mode=mode)
        made = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        np.testing.assert_array_equal(made.run(None, {"X": x})[0], want[mode or "lut"])
    with pytest.raises(RunError, match="mode: got 'fast', expected 'lut', 'exact' or None"):
        register(ort.SessionOptions(), mode="fast")  # type: ignore[arg-type]  # the point of the test


@pytest.mark.parametrize("value", ["fast", "", "LUT", "exact ", "x" * 1000])
def test_an_unknown_entry_is_refused(native: NativeLibrary, value: str) -> None:
    options = ort.SessionOptions()
    options.add_session_config_entry(MODE_ENTRY, value)
    message = f"lit_binq.mode is '{value[:40]}', expected 'lut' or 'exact'"
    with pytest.raises(RunError, match=message):
        register(options)


def test_genai_takes_the_entry(exported: Path, tmp_path: Path) -> None:
    """onnxruntime-genai hands string options that it does not know to the session's configuration."""
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    require_native()
    folder = tmp_path / "genai"
    export_onnx(fusable_model("llama"), byte_tokenizer(), folder, target="genai", head_bits=8, check=False)
    script = HELPERS / "genai_mode.py"
    shown = {}
    for mode in (*MODES, "fast"):
        copy = tmp_path / mode
        shutil.copytree(folder, copy)
        done = subprocess.run([sys.executable, str(script), str(copy), mode], capture_output=True, text=True)
        shown[mode] = (done.returncode, done.stdout, done.stderr)
    for mode in MODES:
        code, out, err = shown[mode]
        assert code == 0, err[-500:]
        found = np.array([float(value) for value in out.split()], np.float32)
        np.testing.assert_allclose(found, logits(exported, mode)[0, -1], atol=1e-6)
    assert shown["fast"][0] != 0
    assert "lit_binq.mode is 'fast'" in shown["fast"][2]
