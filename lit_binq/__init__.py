"""lit_binq: 1-bit language models that can be deployed.

The package calibrates a causal language model block by block to packed one-bit weights inside one Lightning fit. Its
layers stand in pyproject.toml, where `make lint` checks them.

`lit_binq_onnx` (in export/) turns a packed folder into ONNX and runs it.
"""

__version__ = "0.1.0"
