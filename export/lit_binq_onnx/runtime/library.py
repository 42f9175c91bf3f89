"""The native operator library: where it lies, how a session gets it, what it says about itself.

The library is C++ (export/csrc) and optional: without it, ONNX Runtime runs the function bodies of
`lit_binq_onnx.functions` from the same file.
"""

import ctypes
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lit_binq_onnx.runtime.errors import RunError

if TYPE_CHECKING:
    from onnxruntime import SessionOptions

ENVIRONMENT_VARIABLE = "LIT_BINQ_OPS"
"""Names a library file; it then wins over the installed one."""

MODE_ENTRY = "lit_binq.mode"
"""Entry of a session's configuration that the library reads when it is registered: "lut" or "exact" for all operators
of the session. Without it the attribute `exact` of each node decides. (genai_config.json may hold it too, among its
session options.)"""

KERNELS_ENTRY = "lit_binq.kernels"
"""Entry of a session's configuration, read like `MODE_ENTRY`: the kernel set of all operators of the session. Without
it the environment variable LIT_BINQ_KERNELS, read once in a process, else the best set that can run."""

Mode = Literal["lut", "exact"]

LIBRARY_NAMES = ("liblit_binq_ops.so", "liblit_binq_ops.dylib")

HOW_TO_BUILD = (
    "build it with `pip install -e .` (needs CMake and a C++17 compiler), "
    f"or set {ENVIRONMENT_VARIABLE} to a built liblit_binq_ops.so"
)


def _folders() -> list[Path]:
    """Folders that may hold the installed library.

    In an editable install the sources stay in the project while built files go to site-packages, so the
    folder of this file is not enough: every folder of the package counts, and the platform's package folder.
    """
    import lit_binq_onnx

    folders = [Path(folder) for folder in lit_binq_onnx.__path__]
    folders.append(Path(sysconfig.get_path("platlib")) / "lit_binq_onnx")
    return list(dict.fromkeys(folders))


def library_path() -> Path | None:
    """The native library on this machine, or None where there is none.

    Raises:
        RunError: the environment variable LIT_BINQ_OPS names a file that does not exist.
    """
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        path = Path(named)
        if not path.is_file():
            raise RunError(
                f"{ENVIRONMENT_VARIABLE}: got {named}, which is no file; expected the path of a built "
                f"liblit_binq_ops.so: correct or unset {ENVIRONMENT_VARIABLE}"
            )
        return path.resolve()
    for folder in _folders():
        for name in LIBRARY_NAMES:
            if (folder / name).is_file():
                return (folder / name).resolve()
    return None


def required_library_path() -> Path:
    """The native library on this machine.

    Raises:
        RunError: there is none.
    """
    path = library_path()
    if path is None:
        searched = ", ".join(str(folder) for folder in _folders())
        raise RunError(f"native operators: found no {LIBRARY_NAMES[0]} in {searched}; {HOW_TO_BUILD}")
    return path


def register(session_options: "SessionOptions", *, required: bool = True, mode: Mode | None = None) -> bool:
    """Make the native operators known to sessions created with these options. Once for each options object.

    Args:
        session_options: options of a session that does not exist yet.
        mode: of all operators of these sessions: "lut" (int8 tables, fast) or "exact" (float32 activations). None
            follows the attribute `exact` of each node, or the entry `MODE_ENTRY` that the options already have.
        required: raise where the library is missing; otherwise leave the options as they are, and ONNX
            Runtime runs the function bodies.

    Returns:
        Whether the native operators are registered.

    Raises:
        RunError: the mode is unknown; the library is required and missing, or it refuses this ONNX Runtime.
    """
    if mode not in (None, "lut", "exact"):
        raise RunError(f"mode: got {mode!r}, expected 'lut', 'exact' or None")
    path = required_library_path() if required else library_path()
    if path is None:
        return False
    if mode is not None:
        session_options.add_session_config_entry(MODE_ENTRY, mode)  # read by the library while it is registered
    try:
        session_options.register_custom_ops_library(str(path))
    except Exception as error:  # onnxruntime raises its own, undocumented exception types
        reason = " ".join(str(error).split())
        raise RunError(f"native operators: {path} could not be registered ({reason}); {HOW_TO_BUILD}") from error
    return True


@dataclass(frozen=True)
class KernelSet:
    """The kernels of one instruction set, which the library brings."""

    name: str
    """Of "avx512", "avx2", "neon" and "scalar", which is plain C++."""

    lacks: tuple[str, ...]
    """What this machine lacks to run it, by the names in /proc/cpuinfo; empty where it can."""


class NativeLibrary:
    """The C functions beside the operators: the call counter and the kernel sets.

    Args:
        path: the library file; default the one `library_path` finds.

    Raises:
        RunError: the file is missing or is no such library.
    """

    def __init__(self, path: Path | str | None = None) -> None:
        self.path = Path(path) if path is not None else required_library_path()
        try:
            self.handle = ctypes.CDLL(str(self.path))
            self.handle.lit_binq_calls.restype = ctypes.c_int64
            for of_set in (self.handle.lit_binq_kernel_set, self.handle.lit_binq_kernel_set_lacks):
                of_set.argtypes, of_set.restype = [ctypes.c_int], ctypes.c_char_p
            for chosen in (self.handle.lit_binq_kernels, self.handle.lit_binq_kernels_reason):
                chosen.argtypes, chosen.restype = [], ctypes.c_char_p
        except (OSError, AttributeError) as error:
            raise RunError(f"native operators: {self.path} cannot be loaded ({error}); {HOW_TO_BUILD}") from error

    def calls(self) -> int:
        """Multiplications and attentions that native operators have done since the library was loaded."""
        return int(self.handle.lit_binq_calls())

    def kernel_sets(self) -> list[KernelSet]:
        """All kernel sets in the library, the best one first, whether this machine can run them or not."""
        found: list[KernelSet] = []
        while (name := self.handle.lit_binq_kernel_set(len(found))) is not None:
            lacks = self.handle.lit_binq_kernel_set_lacks(len(found)).decode().split()
            found.append(KernelSet(name.decode(), tuple(lacks)))
        return found

    def kernels(self) -> str:
        """Name of the kernel set that sessions run which do not choose one themselves. Chosen once in a process.

        Raises:
            RunError: the environment variable LIT_BINQ_KERNELS asks for a set that is unknown or cannot run here.
        """
        name = self.handle.lit_binq_kernels()
        if name is None:
            raise RunError(f"native operators: {self.reason()}")
        return str(name.decode())

    def reason(self) -> str:
        """Why that set runs, or why none can, in one line."""
        return str(self.handle.lit_binq_kernels_reason().decode())
