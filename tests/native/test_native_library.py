"""Finding, loading and registering the native library."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime as ort
import pytest

import lit_binq_onnx.runtime.library as module
from lit_binq_onnx.runtime.errors import RunError
from lit_binq_onnx.runtime.library import NativeLibrary, library_path, register
from native import require_kernels, require_native


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


def test_the_best_set_runs() -> None:
    for native, others in ((require_native(), []), (require_kernels(), ["scalar-lut5"])):
        names = [one.name for one in native.kernel_sets()]
        x86, arm = ["avx512", "avx2"], ["neon"]
        assert names == (arm if platform.machine() == "aarch64" else x86) + ["scalar", *others]
        best = next(one for one in native.kernel_sets() if not one.lacks)
        assert (native.kernels(), native.reason()) == (best.name, "the best that this processor can run")
    features = set(Path("/proc/cpuinfo").read_text().split())
    for one in native.kernel_sets():
        assert not features.intersection(one.lacks)


def info(**environment: str) -> subprocess.CompletedProcess[str]:
    """`litbinq info` in a process of its own: the environment is read once."""
    code = "from lit_binq.cli.main import command; command()"
    command = [sys.executable, "-c", code, "info"]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


def test_info_shows_the_sets_and_which_one_runs() -> None:
    native = require_native()
    done = info(LIT_BINQ_KERNELS="scalar")
    assert done.returncode == 0, done.stderr
    rows = [(line[:14].strip(), line[14:]) for line in done.stdout.splitlines()]
    assert rows[0] == ("ONNX Runtime", ort.__version__)
    assert rows[1] == ("library", str(native.path))
    assert [text.split(":")[0] for _, text in rows[2:-1]] == [one.name for one in native.kernel_sets()]
    assert rows[-1] == ("runs", "scalar: forced: LIT_BINQ_KERNELS is 'scalar'")
    assert info(LIT_BINQ_KERNELS="").stdout.splitlines()[-1].endswith(f"{native.kernels()}: {native.reason()}")


def test_an_unknown_set_is_an_error() -> None:
    """Where the library is asked, where a session is opened, and by the session's own entry."""
    require_native()
    message = "LIT_BINQ_KERNELS is 'sse9', expected one of "
    done = info(LIT_BINQ_KERNELS="sse9")
    assert done.returncode == 1
    assert done.stderr.startswith(f"litbinq info: error: native operators: {message}")
    assert done.stderr.count("\n") == 1
    code = "import onnxruntime as o; from lit_binq_onnx.runtime.library import register; register(o.SessionOptions())"
    environment = os.environ | {"LIT_BINQ_KERNELS": "sse9"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert message in done.stderr
    options = ort.SessionOptions()
    options.add_session_config_entry(module.KERNELS_ENTRY, "sse9")
    with pytest.raises(
        RunError, match=r"session configuration entry lit_binq\.kernels is 'sse9', expected one of .*scalar"
    ):
        register(options)


def test_a_set_that_cannot_run_is_an_error() -> None:
    for one in require_native().kernel_sets():
        if one.lacks:
            done = info(LIT_BINQ_KERNELS=one.name)
            assert done.returncode == 1
            assert f"is '{one.name}', which needs {' '.join(one.lacks)}, which this processor" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads the dynamic symbols of an ELF file")
def test_only_what_is_used_is_exported() -> None:
    """Nothing of the C++ inside can clash with another library in the process, and nothing is there for tests only."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    command = ["nm", "-D", "--defined-only", str(require_native().path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    of_sets = {"lit_binq_kernel_set", "lit_binq_kernel_set_lacks", "lit_binq_kernels", "lit_binq_kernels_reason"}
    assert {line.split()[-1] for line in done.stdout.splitlines()} == {"RegisterCustomOps", "lit_binq_calls"} | of_sets
