"""What runs an exported model on this machine."""

from collections.abc import Iterator

import onnxruntime as ort

from lit_binq_onnx.runtime.library import HOW_TO_BUILD, NativeLibrary, library_path


def rows() -> Iterator[tuple[str, str]]:
    """Names and texts: ONNX Runtime's version, the library's path, each of its kernel sets, which one runs and why.

    Raises:
        RunError: LIT_BINQ_OPS names no library, or LIT_BINQ_KERNELS no kernel set that can run here. It comes last.
    """
    yield "ONNX Runtime", str(ort.__version__)
    path = library_path()
    if path is None:
        yield "library", f"none, ONNX Runtime runs the operators' bodies; {HOW_TO_BUILD}"
        return
    library = NativeLibrary(path)
    yield "library", str(path)
    for one in library.kernel_sets():
        yield "kernel set", f"{one.name}: " + (f"lacks {' '.join(one.lacks)}" if one.lacks else "can run here")
    yield "runs", f"{library.kernels()}: {library.reason()}"
