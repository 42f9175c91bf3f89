"""From packed PyTorch models to ONNX: nodes, function bodies and the native operator library."""

from lit_binq_onnx.runtime.library import NativeLibrary, library_path, register

__all__ = ["NativeLibrary", "library_path", "register"]
