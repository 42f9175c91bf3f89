"""From a packed model in torch to a folder that ONNX Runtime runs, and the check of it."""
