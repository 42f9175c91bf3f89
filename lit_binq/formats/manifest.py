"""lit_binq.json, the file that makes a folder a packed folder (lit_binq.hub.save_load).

Its keys are

    version        3; folders of version 2 are read too
    linears        {module name: {"format": name, layout...}}, e.g. {"model.layers.0.mlp.up_proj": {"format":
                   "planes", "columns1": 58}}
    tied           {tensor name: name of the tensor it shares its memory with}; the former is not stored
    unquantized_dtype
                   dtype of every floating-point tensor outside the packed weights; `rest_dtype` in older folders
    true_bits      stored bits of the weights inside the blocks, for each of them (lit_binq.hub.bits)
    kv_bits        bits of keys and values (lit_binq.models.kv_cache); 0, or no such key, leaves them as they are
    dense_weights  weights of the dense model, a tied embedding counted once
    files          names of all files of the folder; others in it are none of ours
    facts          whatever the caller wants to keep: source, data, method

Which tensors are tied is read here alone; the flag in config.json was derived from the same model, and must agree. In
version 2 it was its source's, config.json named no quantization method, and `true_bits` counted packed weights alone.
"""

from pathlib import Path
from typing import Any

from lit_binq.errors import LitBinqError
from lit_binq.utils.files import quoted, read_json

MANIFEST = "lit_binq.json"
"""The file that tells a packed folder from a Hugging Face checkpoint."""

VERSION = 3
OLDER = (2,)
"""Versions that are read as well."""

_KINDS: dict[str, type | tuple[type, ...]] = {
    "linears": dict,
    "tied": dict,
    "unquantized_dtype": str,
    "true_bits": (int, float),
    "dense_weights": int,
    "facts": dict,
}


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """lit_binq.json of a packed folder, checked; its keys are in this file's head.

    Raises:
        LitBinqError: no such folder, not a packed one, damaged, or of another format version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LitBinqError(f"packed folder {str(folder)!r}: no such folder; check the path")
    path = folder / MANIFEST
    if not path.is_file():
        raise LitBinqError(
            f"{str(folder)!r} is not a packed folder: it has no {MANIFEST}; expected the output folder of `litbinq fit`"
        )
    where = f"packed folder {str(folder)!r}: {MANIFEST}"
    manifest = {"facts": {}, **read_json(path, (VERSION, *OLDER), where, "write the folder again")}
    if "rest_dtype" in manifest:
        manifest["unquantized_dtype"] = manifest.pop("rest_dtype")
    for key, kind in _KINDS.items():
        if key not in manifest:
            raise LitBinqError(f"{where} lacks {key!r}; write the folder again")
        if not isinstance(manifest[key], kind) or isinstance(manifest[key], bool):
            raise LitBinqError(f"{where}: {key} is {quoted(manifest[key])}, which it cannot be; write the folder again")
    for name, kept in manifest["tied"].items():
        if not isinstance(kept, str):
            raise LitBinqError(
                f"{where}: {quoted(name)} is tied to {quoted(kept)}, expected a name; write the folder again"
            )
    return manifest
