"""Reading a packed folder's model. Nothing that a file says is believed before something else bears it out.

The order is what keeps a damaged or hostile folder from taking memory or time. First the weights file's header, which
names every tensor with its dtype and shape; then the model that config.json and lit_binq.json describe, without memory
(on the meta device) and with no more parts than the header has tensors for; then both are compared; and only a model
whose every tensor the file holds is built for good and filled.
"""

import copy
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules import module as registration
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from lit_binq.errors import LitBinqError, first_line
from lit_binq.formats.manifest import MANIFEST, VERSION
from lit_binq.formats.registry import empty_layer, packed_linears
from lit_binq.hub.bits import dense_weights, true_bits
from lit_binq.hub.config import read_configuration
from lit_binq.models.kv_cache import KV_BITS, set_kv_bits
from lit_binq.models.ties import FLAG, state_ties, tie
from lit_binq.utils.files import quoted

WEIGHTS = "model.safetensors"
UNQUANTIZED_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

_DTYPES = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "BOOL": torch.bool,
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
"""Those of a safetensors header that a model here may have."""

_REPEATED = re.compile("layer|block|label|expert|depth|stage|group|head|codebook|repeat", re.IGNORECASE)
"""Names of numbers in a configuration that say how often something is made."""

_PARTS = 40
"""Modules, parameters and buffers of a model for each tensor stored, at most; real ones have 3 to 6."""

_DERIVED_BYTES = 1 << 30
"""Room for buffers that no file holds, masks and angles, beside as much as the weights file takes."""


class Stored(NamedTuple):
    """A tensor as the weights file describes it."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]


def dtype_name(dtype: torch.dtype | None) -> str:
    """`float16` for torch.float16."""
    return str(dtype).removeprefix("torch.")


def unquantized_names(model: nn.Module, names: list[str]) -> list[str]:
    """Those of `names` that are not part of a packed weight. A packed linear's bias belongs to the rest."""
    packed = {f"{module}.{buffer}" for module, m in packed_linears(model).items() for buffer in m.weight_buffers()}
    return [name for name in names if name not in packed]


@contextmanager
def damaged(name: str, folder: Path) -> Iterator[None]:
    """Turn whatever reading a damaged file raises into one line."""
    try:
        yield
    except LitBinqError:
        raise
    except BaseException as error:  # the tokenizers library raises bare Exception, and its panics are not even that
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise LitBinqError(
            f"packed folder {str(folder)!r}: {name} is damaged or missing ({first_line(error)}); write the folder again"
        ) from error


def read_model(folder: Path, manifest: dict[str, Any]) -> PreTrainedModel:
    """The model of a packed folder, on the host in evaluation mode, rest as float32; without generation settings.

    Args:
        folder: the folder.
        manifest: what `read_manifest` read of it.

    Raises:
        LitBinqError: a file is missing, damaged, or does not fit the others.
    """
    for name in ("config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise LitBinqError(f"packed folder {str(folder)!r}: {name} is missing; expected a complete packed folder")
    where = f"packed folder {str(folder)!r}: {MANIFEST}"
    if manifest["unquantized_dtype"] not in UNQUANTIZED_DTYPES:
        raise LitBinqError(
            f"{where}: unquantized_dtype is {quoted(manifest['unquantized_dtype'])}, expected one of "
            f"{', '.join(UNQUANTIZED_DTYPES)}; write the folder again"
        )
    bits = manifest.get("kv_bits", 0)
    if isinstance(bits, bool) or bits not in KV_BITS:
        raise LitBinqError(
            f"{where} asks for kv_bits {quoted(bits)}, expected one of {', '.join(map(str, KV_BITS))}; it was written "
            "by another version of this program"
        )
    header = _read_header(folder)
    with damaged("config.json", folder):
        _require_plausible(json.loads((folder / "config.json").read_text(encoding="utf-8")), len(header))
        config = read_configuration(folder)
        with torch.device("meta"), _counted(1000 + _PARTS * len(header)), no_init_weights():
            skeleton = _from_config(copy.deepcopy(config))
    with torch.device("meta"):
        _replace_linears(skeleton, manifest["linears"], folder)
    _require_fit(skeleton, header, manifest, folder)
    with damaged("config.json", folder), no_init_weights():
        # Memory of the dense linears is reserved but never touched: they are replaced before reading.
        model = _from_config(config)
    _replace_linears(model, manifest["linears"], folder)
    stated = getattr(model.config, FLAG, None)
    with damaged(MANIFEST, folder):
        tie(model, manifest["tied"])
        state_ties(model)
        set_kv_bits(model, bits)
    if manifest["version"] == VERSION and stated != getattr(model.config, FLAG, None):
        raise LitBinqError(
            f"packed folder {str(folder)!r}: config.json says {FLAG} {stated}, but {MANIFEST} the opposite; "
            "expected the same of both, as they were written: write the folder again"
        )
    _load_tensors(model, folder)
    model.stored_dtype = UNQUANTIZED_DTYPES[manifest["unquantized_dtype"]]  # type: ignore[assignment]  # a plain attribute
    counted = {"true_bits": true_bits(model), "dense_weights": dense_weights(model)}
    for key, value in counted.items():
        if manifest["version"] == VERSION and manifest[key] != value:
            raise LitBinqError(
                f"{where} says {key} {quoted(manifest[key])}, but its tensors say {value}; write the folder again"
            )
    return model.eval()


def _from_config(config: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)


def _read_header(folder: Path) -> dict[str, Stored]:
    """Every tensor of the weights file, whose bytes are all there."""
    header = {}
    with _whole(folder), safe_open(folder / WEIGHTS, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # no mapping
            part = file.get_slice(name)
            header[name] = Stored(_DTYPES.get(part.get_dtype()), tuple(part.get_shape()))
    return header


@contextmanager
def _whole(folder: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise LitBinqError(
            f"packed folder {str(folder)!r}: {WEIGHTS} is damaged or truncated ({first_line(error)}); write the folder "
            "again"
        ) from error


def _require_plausible(values: Any, tensors: int, key: str = "") -> None:
    """Refuse numbers of layers and the like that no model with so many tensors has: a loop runs over each."""
    if isinstance(values, dict):
        for name, value in values.items():
            _require_plausible(value, tensors, name)
    elif isinstance(values, list):
        for value in values:
            _require_plausible(value, tensors, key)
    elif isinstance(values, (int, float)) and _REPEATED.search(key) and not abs(values) <= 4096 + tensors:
        raise ValueError(f"{key} is {values}, with {tensors} tensors")


@contextmanager
def _counted(limit: int) -> Iterator[None]:
    """Let no more modules, parameters and buffers be made than `limit`."""
    made = 0

    def count(*_: Any) -> None:
        nonlocal made
        made += 1
        if made > limit:
            raise ValueError(f"a model of more than {limit} parts, many more than there are tensors")

    handles = [
        registration.register_module_module_registration_hook(count),
        registration.register_module_parameter_registration_hook(count),
        registration.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _replace_linears(model: nn.Module, linears: dict[str, Any], folder: Path) -> None:
    """Put an empty packed linear at every name of `linears`."""
    for name, entry in linears.items():
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear):
            raise LitBinqError(
                f"packed folder {str(folder)!r}: {MANIFEST} names {quoted(name)[1:-1]}, which is no linear "
                "layer of config.json's model"
            )
        try:
            model.set_submodule(name, empty_layer(linear, entry))
        except LitBinqError as error:
            raise LitBinqError(f"packed folder {str(folder)!r}: linear {name}: {error}") from error


def _require_fit(skeleton: PreTrainedModel, header: dict[str, Stored], manifest: dict[str, Any], folder: Path) -> None:
    """Make sure that the weights file holds every tensor of a model, and no other."""
    where = f"packed folder {str(folder)!r}: {WEIGHTS}"
    state, tied = skeleton.state_dict(), manifest["tied"]
    for name, kept in tied.items():
        if name not in state or kept not in state or kept in tied or state[name].shape != state[kept].shape:
            raise LitBinqError(
                f"packed folder {str(folder)!r}: {MANIFEST} ties {quoted(name)} to {quoted(kept)}, expected two "
                "tensors of the model that are alike; write the folder again"
            )
    if wrong := sorted((state.keys() - tied.keys()) ^ header.keys()):
        there = "has an unexpected" if wrong[0] in header else "lacks the"
        raise LitBinqError(
            f"{where} {there} tensor {quoted(wrong[0])[1:-1]} ({len(wrong)} differ); write the folder again"
        )
    rest, unquantized_dtype = (
        set(unquantized_names(skeleton, list(state))),
        UNQUANTIZED_DTYPES[manifest["unquantized_dtype"]],
    )
    for name, stored in header.items():
        target = state[name]
        dtype = unquantized_dtype if name in rest and target.is_floating_point() else target.dtype
        if stored != (dtype, tuple(target.shape)):
            raise LitBinqError(
                f"{where}: {name} is {dtype_name(stored.dtype)} {stored.shape}, expected {dtype_name(dtype)} "
                f"{tuple(target.shape)}: do config.json and {WEIGHTS} belong together?"
            )
    derived = sum(b.nbytes for name, b in skeleton.named_buffers() if name not in state)
    if derived > _DERIVED_BYTES + (folder / WEIGHTS).stat().st_size:
        raise LitBinqError(
            f"packed folder {str(folder)!r}: config.json describes a model with {derived} bytes that no file holds, "
            f"expected at most {_DERIVED_BYTES} beside the weights; write the folder again"
        )


@torch.no_grad()
def _load_tensors(model: nn.Module, folder: Path) -> None:
    """Copy every stored tensor into the model's own, one after the other, tied ones once."""
    state = model.state_dict()
    with _whole(folder), safe_open(folder / WEIGHTS, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # no mapping
            state[name].copy_(file.get_tensor(name))
    for name, layer in packed_linears(model).items():
        try:
            layer.refresh()
        except ValueError as error:
            raise LitBinqError(
                f"packed folder {str(folder)!r}: {WEIGHTS}: {name}: {first_line(error)}; write the folder again"
            ) from error
