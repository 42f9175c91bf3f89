"""lit_binq.json, the file that makes a folder a packed folder (lit_binq.hub).

Its keys are

    version        2
    linears        {module name: {"format": name, layout...}}, e.g. {"model.layers.0.mlp.up_proj": {"format":
                   "planes", "columns1": 58}}
    tied           {tensor name: name of the tensor it shares its memory with}; the former is not stored
    rest_dtype     dtype of every floating-point tensor outside the packed weights
    true_bits      stored bits for each weight of the packed linears
    kv_bits        bits of keys and values (lit_binq.kv_cache); 0, or no such key, leaves them as they are
    dense_weights  weights of the dense model, a tied embedding counted once
    facts          whatever the caller wants to keep: source, data, method

Touches nothing but files and errors.
"""

from pathlib import Path
from typing import Any

from lit_binq.errors import LitBinqError
from lit_binq.files import read_json

PACKED_MARKER = "lit_binq.json"
"""The file that tells a packed folder from a Hugging Face checkpoint."""

VERSION = 2


def read_marker(folder: str | Path) -> dict[str, Any]:
    """lit_binq.json of a packed folder, checked; its keys are in this file's head.

    Raises:
        LitBinqError: no such folder, not a packed one, damaged, or of another format version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LitBinqError(f"packed folder {str(folder)!r}: no such folder; check the path")
    path = folder / PACKED_MARKER
    if not path.is_file():
        raise LitBinqError(
            f"{str(folder)!r} is not a packed folder: it has no {PACKED_MARKER}; expected the output folder "
            "of `litbinq fit`"
        )
    marker = read_json(path, VERSION, f"packed folder {str(folder)!r}: {PACKED_MARKER}", "write the folder again")
    missing = {"linears", "tied", "rest_dtype", "true_bits", "dense_weights"} - marker.keys()
    if missing:
        raise LitBinqError(
            f"packed folder {str(folder)!r}: {PACKED_MARKER} lacks {sorted(missing)[0]!r}; write the folder again"
        )
    return marker
