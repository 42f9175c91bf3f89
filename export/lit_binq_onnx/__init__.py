"""From packed PyTorch models to ONNX: nodes, function bodies and the native operator library."""

from lit_binq_onnx.functions import binary_matmul_function
from lit_binq_onnx.library import NativeLibrary, library_path, register

__all__ = ["NativeLibrary", "binary_matmul_function", "library_path", "register"]
