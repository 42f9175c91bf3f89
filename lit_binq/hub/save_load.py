"""Packed folders: a quantized model on disk, and back.

A packed folder holds

    lit_binq.json            what is packed how, see lit_binq.formats.manifest
    model.safetensors        every tensor of the model once
    config.json, generation_config.json, tokenizer files    as Hugging Face writes them

What is stored is what is computed with: packed weights are the very buffers of their modules, and everything
else (embeddings, norms, head, biases: "the rest") is rounded to `unquantized_dtype` in the model before writing.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lit_binq.errors import LitBinqError
from lit_binq.formats import FORMATS
from lit_binq.formats.manifest import MANIFEST, VERSION, read_manifest
from lit_binq.formats.registry import describe_layer, packed_linears
from lit_binq.formats.unquantized import round_unquantized
from lit_binq.hub.bits import dense_weights, true_bits
from lit_binq.hub.config import FORMAT, difference, write_configuration
from lit_binq.hub.reader import UNQUANTIZED_DTYPES, WEIGHTS, damaged, dtype_name, read_model, unquantized_names
from lit_binq.models.blocks import move
from lit_binq.models.kv_cache import kv_bits
from lit_binq.models.ties import distinct_state
from lit_binq.utils.files import finite, new_folder
from lit_binq.utils.places import require_folder


def require_target(folder: Path) -> None:
    """Refuse a place a packed folder must not be written to.

    Raises:
        LitBinqError: a file, or a folder with other files in it, or nowhere to write.
    """
    require_folder(folder, "output", MANIFEST)


def save_packed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    facts: dict[str, Any],
    unquantized_dtype: torch.dtype = torch.float16,
    windows: Tensor | None = None,
) -> None:
    """Write a packed folder; the model's rest is rounded to `unquantized_dtype` in place first (`round_unquantized`).

    Args:
        model: a causal language model whose packed linears are in place.
        tokenizer: its tokenizer.
        folder: where to; an empty folder or an older packed folder there is replaced once all is written.
        facts: JSON values to keep with the model, under the key `facts`.
        unquantized_dtype: float16, bfloat16 or float32.
        windows: (n, T) int64 tokens. If given, the folder is loaded before it takes its name, and its tensors, and its
            logits on these windows, must be the model's, bit for bit; both then compute on the host.

    Raises:
        LitBinqError: the folder holds something else, no linear is packed, the format of a packed linear has
            no name here, a tensor does not fit `unquantized_dtype`, or what was written is read as another model.
            Nothing is written then.
    """
    folder = Path(folder)
    require_target(folder)
    if dtype_name(unquantized_dtype) not in UNQUANTIZED_DTYPES:
        raise LitBinqError(
            f"unquantized_dtype: got {dtype_name(unquantized_dtype)}, expected one of {', '.join(UNQUANTIZED_DTYPES)}"
        )
    linears: dict[str, dict[str, Any]] = {}
    for name, module in packed_linears(model).items():
        if FORMATS.get(module.kind) is not type(module):
            raise LitBinqError(f"linear {name}: format {type(module).__name__} cannot be stored in a packed folder")
        linears[name] = describe_layer(module)
    round_unquantized(model, unquantized_dtype)
    bits = true_bits(model)
    state, tied = distinct_state(model)
    rest = set(unquantized_names(model, list(state)))
    tensors = {
        name: t.detach()
        .to("cpu", unquantized_dtype if name in rest and t.is_floating_point() else t.dtype)
        .contiguous()
        for name, t in state.items()
    }
    manifest = {
        "version": VERSION,
        "linears": linears,
        "tied": tied,
        "unquantized_dtype": dtype_name(unquantized_dtype),
        "true_bits": bits,
        "kv_bits": kv_bits(model),
        "dense_weights": dense_weights(model),
        "facts": facts,
    }
    with new_folder(folder, MANIFEST) as work:
        write_configuration(model, work)
        tokenizer.save_pretrained(work)
        save_file(tensors, work / WEIGHTS, metadata=FORMAT)
        (work / WEIGHTS).chmod(0o644)  # safetensors leaves 0600, which other users could not read
        text = json.dumps(finite(manifest), indent=1, allow_nan=False)
        (work / MANIFEST).write_text(text + "\n", encoding="utf-8")
        if windows is not None:
            del tensors, state
            _require_same(model, work, windows, folder)


@torch.no_grad()
def _require_same(model: PreTrainedModel, work: Path, windows: Tensor, folder: Path) -> None:
    """Read `work`, which is to become `folder`, and compare tensors and logits with the model's, bit for bit."""
    again, _ = load_packed(work)
    mine, theirs = (m.state_dict() for m in (model.eval(), again))
    differing = [name for name, tensor in mine.items() if name not in theirs or not _equal(tensor, theirs[name])]
    if found := difference(model.config, again.config):
        differing = [f"configuration: {found}"]
    if not differing and mine.keys() == theirs.keys():
        ids = windows.to("cpu", torch.int64)
        one, two = (m(input_ids=ids, use_cache=False).logits for m in (model.cpu(), again))
        if _equal(one, two):
            return
        differing = [f"logits, by up to {float((one - two).abs().max()):g}"]
    raise LitBinqError(
        f"output {str(folder)!r}: read again, what was written is another model than the one in memory "
        f"({(differing or ['names of tensors'])[0]}), expected the same bits; nothing was kept: this is a fault of "
        "this program, resume with --ckpt_path once it is mended"
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    """The same bits: of NaN too, and -0 is not 0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    # Flat: a tensor without axes has no last one to take apart.
    first, second = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(first, second)


def load_packed(
    folder: str | Path, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a packed folder for computing in float32; logits equal the saved model's bit for bit.

    Args:
        folder: what `save_packed` wrote.
        device: where the model goes.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        LitBinqError: not a packed folder, a missing, damaged or truncated file, tensors that do not fit the
            configuration, or an unknown format or version.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    model = read_model(folder, manifest)
    if (folder / "generation_config.json").is_file():
        with damaged("generation_config.json", folder):
            model.generation_config = type(model.generation_config).from_pretrained(folder, local_files_only=True)
    with damaged("tokenizer", folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return move(model, torch.device(device)), tokenizer
