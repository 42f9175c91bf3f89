"""From packed PyTorch models to ONNX: nodes, function bodies and the native operator library."""

from typing import TYPE_CHECKING, Any

from lit_binq_onnx.runtime.library import NativeLibrary, library_path, register

if TYPE_CHECKING:
    from lit_binq_onnx.functions import binary_matmul_function

__all__ = ["NativeLibrary", "binary_matmul_function", "library_path", "register"]


def __getattr__(name: str) -> Any:
    """Function bodies are imported when they are asked for: with them comes onnx, which running a model needs not."""
    if name == "binary_matmul_function":
        from lit_binq_onnx.functions import binary_matmul_function

        return binary_matmul_function
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
