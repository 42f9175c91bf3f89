"""An exported model runs with numpy, ONNX Runtime and tokenizers, and nothing else is imported or needed."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_tokenizer

from exporting import fusable_model
from lit_binq.cli import main as cli
from lit_binq_onnx.build.export import export_onnx
from lit_binq_onnx.runtime.library import library_path

ROOT = Path(__file__).resolve().parents[3]
HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "lit_binq", "lightning", "jsonargparse", "datasets"}
MODULES = sorted(path.stem for path in (ROOT / "export/lit_binq_onnx/runtime").glob("*.py") if path.stem != "__init__")


def imported(code: str) -> set[str]:
    """Top packages that a process of its own imports, by Python's own report."""
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}


def test_running_imports_little() -> None:
    found = imported("import " + ", ".join(f"lit_binq_onnx.runtime.{name}" for name in MODULES))
    assert {"lit_binq_onnx", "numpy", "onnxruntime", "tokenizers"} <= found
    assert found & HEAVY == set()


def test_the_command_imports_little() -> None:
    assert imported("import lit_binq.cli.main") & (HEAVY - {"lit_binq"} | {"numpy", "onnxruntime"}) == set()


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        (["fit", "--config", "a.yaml"], "torch", "calibrate"),
        (["compare", "--config", "a.yaml"], "torch", "calibrate"),
        (["export", "packed", "out"], "torch", "export"),
        (["check", "out"], "onnx", "export"),
        (["bench", "ops"], "onnx", "bench"),
        (["report", "run"], "matplotlib", "report"),
    ],
)
def test_a_missing_package_is_one_line(arguments: list[str], package: str, extra: str) -> None:
    """As in an installation without any extra: importing one of theirs fails."""
    code = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {{*{sorted(HEAVY - {"lit_binq"})!r}, "matplotlib", "yaml"}}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
from lit_binq.cli.main import main
sys.exit(main({arguments!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr[-2000:]
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("litbinq ")
    assert ": error: needs " in done.stderr
    assert done.stderr.endswith(f": pip install 'lit-binq[{extra}]'\n")


@pytest.mark.slow
def test_a_bare_installation_writes_the_same_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The wheel, numpy, ONNX Runtime and tokenizers in a new environment."""
    out, bare = tmp_path / "onnx", tmp_path / "bare"
    export_onnx(fusable_model("llama"), byte_tokenizer(), out, check=False)
    arguments = ["generate", str(out), "--prompt", "the cat", "--max_new_tokens", "12", "--threads", "1"]
    assert cli.main(arguments) == 0
    expected = capfd.readouterr().out
    assert len(expected) > len("the cat\n")

    def pip(python: Path | str, *words: str) -> None:
        command = [str(python), "-m", "pip", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]

    pip(sys.executable, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path / "wheels"), str(ROOT))
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(bare)], check=True)
    pip(bare / "bin/python", "install", "-q", "-c", str(ROOT / "constraints.txt"), str(wheel))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    quiet: dict[str, Any] = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([str(bare / "bin/litbinq"), *arguments], **quiet)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == expected
    assert ("native operators" in done.stderr) == (library_path() is not None)
    missing = subprocess.run([str(bare / "bin/litbinq"), "fit"], **quiet)
    assert missing.returncode == 1
    assert missing.stderr == "litbinq fit: error: needs torch: pip install 'lit-binq[calibrate]'\n"
