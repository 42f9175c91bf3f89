"""Finding, loading and registering the native library."""

from pathlib import Path

import onnxruntime as ort
import pytest

import lit_binq_onnx.runtime.library as module
from lit_binq_onnx.runtime.errors import RunError
from lit_binq_onnx.runtime.library import NativeLibrary, library_path, register
from native import require_native


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No library is named, and the only folder searched is empty."""
    monkeypatch.delenv(module.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(module, "_folders", lambda: [tmp_path])
    return tmp_path


def test_the_environment_wins(monkeypatch: pytest.MonkeyPatch, nowhere: Path, tmp_path: Path) -> None:
    installed, named = nowhere / module.LIBRARY_NAMES[0], tmp_path / "named.so"
    installed.touch()
    named.touch()
    assert library_path() == installed.resolve()
    monkeypatch.setenv(module.ENVIRONMENT_VARIABLE, str(named))
    assert library_path() == named.resolve()
    monkeypatch.setenv(module.ENVIRONMENT_VARIABLE, str(tmp_path / "gone.so"))
    with pytest.raises(RunError, match=r"LIT_BINQ_OPS: got .*gone\.so, which is no file"):
        library_path()


def test_every_folder_of_the_package_is_searched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in an editable install: sources here, the built file elsewhere on the package's path."""
    import lit_binq_onnx

    monkeypatch.delenv(module.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(lit_binq_onnx, "__path__", [str(tmp_path / "empty"), str(tmp_path)])
    (tmp_path / module.LIBRARY_NAMES[0]).touch()
    assert library_path() == (tmp_path / module.LIBRARY_NAMES[0]).resolve()


def test_a_missing_library(nowhere: Path) -> None:
    assert library_path() is None
    assert register(ort.SessionOptions(), required=False) is False
    with pytest.raises(RunError, match=r"found no liblit_binq_ops\.so in .*pip install"):
        register(ort.SessionOptions())
    with pytest.raises(RunError, match=r"found no liblit_binq_ops\.so"):
        NativeLibrary()


def test_a_file_that_is_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "fake.so"
    fake.write_text("not a library")
    monkeypatch.setenv(module.ENVIRONMENT_VARIABLE, str(fake))
    with pytest.raises(RunError, match=r"fake\.so cannot be loaded"):
        NativeLibrary()
    with pytest.raises(RunError, match=r"fake\.so could not be registered"):
        register(ort.SessionOptions())


def test_registering() -> None:
    require_native()
    assert register(ort.SessionOptions()) is True


def test_steering() -> None:
    native = require_native()
    assert native.isas()[-2:] == ["scalar", "scalar-lut5"]
    assert set(native.isas()[:-2]) <= {"avx512", "avx2", "neon"}
    best = native.isa()
    assert best == native.isas()[0]
    for name in native.isas():
        native.force_isa(name)
        assert native.isa() == name
    native.force_isa(best)
    with pytest.raises(RunError, match=r"force_isa: got 'sse9', expected .* one of .*scalar"):
        native.force_isa("sse9")
