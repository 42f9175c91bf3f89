"""lit_binq: 1-bit language models that can be deployed.

The package calibrates a causal language model block by block to packed one-bit weights inside one Lightning
fit. Rooms, from the outside in (imports point only this way):

    cli -> calibration -> stages -> streams, objectives, solvers -> formats

`lit_binq_onnx` (in export/) turns a packed folder into ONNX and runs it.
"""

__version__ = "0.1.0"
