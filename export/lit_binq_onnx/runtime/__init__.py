"""Running an exported folder: ONNX Runtime, numpy and the native library."""
