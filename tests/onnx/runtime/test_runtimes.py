"""One exported file means the same in every ONNX Runtime that is promised, with the native library and without.

Each runtime is installed into a folder of its own by pip; where that cannot be, the test says so and is skipped.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import HELPERS, byte_tokenizer

import lit_binq_onnx.runtime.session as session_module
from exporting import fusable_model
from length_models import plain_copy, plain_logits
from lit_binq_onnx.build.export import export_onnx
from lit_binq_onnx.runtime.errors import RunError
from lit_binq_onnx.runtime.library import library_path
from lit_binq_onnx.runtime.session import OnnxModel

RUNTIMES = {"1.18.1": "numpy<2", "1.20.1": "numpy", "1.23.2": "numpy", "1.24.1": "numpy", "1.32.0": "numpy"}
"""The oldest promised, two in the middle, the first whose bodies are trusted, the newest; and numpy for each."""

KINDS = ("llama", "mistral", "qwen2")
"""No window; one of 8 tokens in every block; one of 6 in the second block, biases."""

LENGTH = 40
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each kind, and beside it plain transformers' logits of one pass over each row."""
    place = tmp_path_factory.mktemp("runtimes")
    for kind in KINDS:
        model = fusable_model(kind)
        assert export_onnx(model, byte_tokenizer(), place / kind, check=False)["fused"]
        ids = np.random.default_rng(0).integers(0, 256, (3, LENGTH))
        logits = plain_logits(plain_copy(model), ids, [(0, LENGTH)])
        np.savez(place / f"{kind}.npz", ids=ids, logits=logits)
    return place


@pytest.fixture(scope="module", params=RUNTIMES)
def runtime(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one ONNX Runtime in it."""
    folder = tmp_path_factory.mktemp(f"onnxruntime-{request.param}")
    wanted = [f"onnxruntime=={request.param}", RUNTIMES[request.param]]
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *wanted]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        pytest.skip(f"pip cannot install onnxruntime {request.param}: {reason}")
    return folder


def run(runtime: Path, folder: Path, *arguments: str) -> tuple[dict[str, object], str]:
    """What the runner reports, and what it logs."""
    expected = folder.with_suffix(".npz")
    command = [sys.executable, str(HELPERS / "runtime_runner.py"), str(folder), str(expected)]
    environment = {**os.environ, "PYTHONPATH": str(runtime)}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.grid(1)
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_runtime_computes_the_same(exported: Path, runtime: Path, kind: str) -> None:
    version = tuple(map(int, runtime.name.removeprefix("onnxruntime-").split(".")[:2]))
    ways = ["unmodified"] if library_path() is None else ["unmodified", "native"]
    for way in ways:
        for route in ("generic", "auto"):
            report, told = run(runtime, exported / kind, route, way)
            assert str(report["version"]).startswith(".".join(map(str, version)))
            print(kind, way, route, report)
            trusted = way == "native" or version >= session_module.FUSED_BODIES_SINCE
            assert report["route"] == ("fused" if route == "auto" and trusted else "generic")
            assert ("taking the generic graph instead" in told) == (route == "auto" and not trusted)
            for reading in ("prompt", "two parts", "decode"):
                assert float(str(report[reading])) < TOLERANCE, (kind, way, route, report)


@pytest.mark.slow
def test_old_runtimes_take_the_generic_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = fusable_model("mistral")
    export_onnx(model, byte_tokenizer(), tmp_path / "out", check=False)
    monkeypatch.setattr(session_module.ort, "__version__", "1.23.2")
    monkeypatch.setattr(session_module, "_warned", set())
    for _ in range(2):
        assert OnnxModel(tmp_path / "out", native=False).route == "generic"
    assert caplog.text.count("ONNX Runtime 1.23.2 runs the fused graph's function bodies otherwise") == 1
    with pytest.raises(RunError, match=r"route: got 'fused', but ONNX Runtime 1\.23\.2"):
        OnnxModel(tmp_path / "out", native=False, route="fused")
    if library_path() is not None:
        assert OnnxModel(tmp_path / "out", native=True).route == "fused"
    monkeypatch.setattr(session_module.ort, "__version__", "1.24.0")
    assert OnnxModel(tmp_path / "out", native=False).route == "fused"
