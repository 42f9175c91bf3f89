"""The kernels' own test program (export/csrc/tests), built from source for this machine and for 64-bit Arm.

It compares every instruction set that is compiled in with plain C++ and needs neither ONNX Runtime nor Python, so the
Arm kernels are run under an emulator where there is one. Debian has both parts: g++-aarch64-linux-gnu and qemu-user.
"""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SOURCES = ROOT / "export" / "csrc"
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def tool(name: str) -> str:
    """A program beside this Python or on the path. Skips the test where there is none."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def build(folder: Path, *options: str) -> Path:
    """The test program, built as the library is: it must be the code that is shipped."""
    cmake = tool("cmake")
    subprocess.run(
        [cmake, "-S", SOURCES, "-B", folder, "-DCMAKE_BUILD_TYPE=Release", *options], check=True, capture_output=True
    )
    done = subprocess.run(
        [cmake, "--build", folder, "--target", "kernel_test", "--parallel", "2"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning:" not in done.stdout + done.stderr
    return folder / "kernel_test"


def sets_compared(*command: str | Path) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the test program is linked statically")
def test_all_sets_of_this_machine_agree(tmp_path: Path) -> None:
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("there is no C++ compiler")
    sets = sets_compared(build(tmp_path))
    of_sets = list(tmp_path.rglob("sets/avx*.o"))
    assert bool(of_sets) == (platform.machine() == "x86_64")
    for file in of_sets:  # the linker could choose such a symbol for processors without these instructions
        done = subprocess.run([tool("nm"), file], capture_output=True, text=True, check=True)
        shared = [line for line in done.stdout.splitlines() if line.split()[-2] in ("W", "V", "u")]
        assert shared == [], file
    assert sets[-2:] == ["scalar", "scalar-lut5"]
    known = Path("/proc/cpuinfo").read_text().split()
    assert ("avx2" in sets) == ("avx2" in known)
    assert ("avx512" in sets) == {"avx512bw", "avx512vl", "avx512vbmi", "avx512_vnni"}.issubset(known)
    assert ("neon" in sets) == (platform.machine() == "aarch64")


def test_neon_agrees_under_an_emulator(tmp_path: Path) -> None:
    compiler, emulator = tool(CROSS_COMPILER), tool(EMULATOR)
    program = build(
        tmp_path,
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={compiler}",
    )
    assert sets_compared(emulator, program) == ["neon", "scalar", "scalar-lut5"]


def test_the_library_builds_for_arm(tmp_path: Path) -> None:
    """Every source file, two-plane operators included, without warnings."""
    compiler, cmake = tool(CROSS_COMPILER), tool("cmake")
    options = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={compiler}"]
    subprocess.run([cmake, "-S", SOURCES, "-B", tmp_path, *options], check=True, capture_output=True)
    done = subprocess.run([cmake, "--build", tmp_path, "--parallel", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning:" not in done.stdout + done.stderr
    assert (tmp_path / "liblit_binq_ops.so").is_file()
