"""Causal language models and their tokenizers: from a hub id, a local folder, or a GGUF file.

Whatever comes out is a plain Hugging Face model in evaluation mode, with finite weights, that
`save_pretrained` can write again; its source format is not visible any more.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lit_binq.errors import LitBinqError, first_line
from lit_binq.formats.manifest import MANIFEST
from lit_binq.models.gguf_checks import require_stated, tensors_left_out
from lit_binq.models.gguf_files import read_gguf
from lit_binq.models.gguf_loading import read_once
from lit_binq.models.gguf_tokenizers import repaired
from lit_binq.models.quantized_sources import dequantizing, forget_quantizer
from lit_binq.models.ties import state_ties

log = logging.getLogger(__name__)


def looks_like_path(source: str) -> bool:
    """Whether `source` can only be meant as a file or folder: hub ids are `name` or `owner/name`."""
    return source.startswith(("/", ".", "~", "\\")) or source.count("/") > 1 or source.endswith(".gguf")


def _local(source: str) -> Path | None:
    """The file or folder `source` names, or None for a hub id.

    Raises:
        LitBinqError: a path that does not exist, a folder without config.json, or a file that is not GGUF.
    """
    path = Path(source).expanduser()
    if not path.exists():
        if looks_like_path(source):
            raise LitBinqError(
                f"model {source!r}: no such file or folder; expected a hub id (owner/name), a checkpoint "
                "folder or a .gguf file: check the path"
            )
        return None
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LitBinqError(
                f"model {source!r}: the folder has no config.json; expected a Hugging Face checkpoint folder "
                "(for GGUF, name the .gguf file itself)"
            )
    elif path.suffix.lower() != ".gguf":
        raise LitBinqError(f"model {source!r}: a file of type {path.suffix!r}; expected a folder or a .gguf file")
    return path


@contextmanager
def _one_line_errors(what: str, source: str) -> Iterator[None]:
    """Turn what the libraries raise while they read `source` into a LitBinqError."""
    try:
        yield
    except LitBinqError:
        raise
    except Exception as error:  # parsers, network and tensor readers below each raise their own kinds
        local = Path(source).expanduser().exists()
        hint = (
            "check that it is a complete checkpoint of a causal language model"
            if local
            else "no local file or folder has this name: is the hub id spelled right, and is there network?"
        )
        raise LitBinqError(f"{what} {source!r} cannot be loaded ({first_line(error)}); {hint}") from error


def load_model(
    source: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    drop_tensors: Sequence[str] = (),
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode.

    Args:
        source: a hub id (`owner/name`), a checkpoint folder, or a `.gguf` file (dequantized on the way).
        revision: branch, tag or commit, for a hub id.
        dtype: dtype of the weights.
        drop_tensors: regular expressions, matched anywhere in a name, of tensors of the checkpoint that may be left
            out although the model does not take them.

    Raises:
        LitBinqError: no such source, not a causal language model or an architecture that transformers does
            not know, fused experts, tensors missing from the checkpoint or left over, or a weight that is NaN or
            infinite.
    """
    patterns = check_patterns(drop_tensors)
    path = _local(source)
    where: str | Path = source if path is None else path
    options: dict[str, Any] = {"revision": revision} if path is None and revision else {}
    if path is not None and (path / MANIFEST).is_file():
        raise LitBinqError(
            f"model {source!r}: a packed folder; expected a full-precision checkpoint "
            "(packed folders are read by lit_binq.hub.load_packed)"
        )
    file = path if path is not None and path.is_file() else None
    if file is not None:
        options = {"gguf_file": str(file.resolve())}
    with _one_line_errors("model", source), read_once(file, False) if file else nullcontext(where) as where:
        config = _check_architecture(source, where, options, file)
        widened = {} if file else dequantizing(config, source)
        options |= widened
        loaded: Any = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, output_loading_info=True, **options)
        model: PreTrainedModel = loaded[0]
        unexpected = [*loaded[1]["unexpected_keys"], *(tensors_left_out(read_gguf(file), model) if file else ())]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise LitBinqError(
            f"model {source!r}: the checkpoint lacks {len(missing)} tensors of {type(model).__name__} "
            f"(first: {missing[0]}); expected a complete causal language model: check the source"
        )
    left = sorted(name for name in unexpected if not any(p.search(name) for p in patterns))
    if left:
        raise LitBinqError(
            f"model {source!r}: {type(model).__name__} does not take {len(left)} tensors of the checkpoint (first: "
            f"{left[0]}); expected all of them to be used: check config.json, or name those that may be left out with "
            f"the option `drop_tensors`, e.g. [{re.escape(left[0])!r}]"
        )
    if file is not None:
        _forget_gguf(model, file)
    elif widened:
        forget_quantizer(model, dtype)
    state_ties(model)
    check_finite(model, source)
    return model.eval()


def _check_architecture(source: str, where: str | Path, options: dict[str, Any], file: Path | None) -> Any:
    """The configuration; refuses what transformers cannot build as a causal language model, before weights are read."""
    with _one_line_errors("model", source):
        config = AutoConfig.from_pretrained(where, **options)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError) as error:
        raise LitBinqError(
            f"model {source!r}: architecture {config.model_type!r} is not a causal language model that "
            "transformers knows; expected one that AutoModelForCausalLM can build, e.g. llama, opt or qwen2"
        ) from error
    require_own_experts(model, source)
    if file is not None:
        require_stated(read_gguf(file), model.config)
    return config


def require_own_experts(model: PreTrainedModel, source: str) -> None:
    """Refuse mixtures of experts that keep all experts in one tensor: nothing here can quantize them.

    They are most of such a model, which would come out as large as it was.

    Raises:
        LitBinqError: the model has such experts.
    """
    for name, module in model.named_modules():
        if "experts" in type(module).__name__.lower():
            for leaf, p in module._parameters.items():
                if p is not None and p.dim() > 1:
                    raise LitBinqError(
                        f"model {source!r}: a mixture of experts that are fused into one tensor ({name}.{leaf}, "
                        f"{' x '.join(map(str, p.shape))}), which cannot be quantized yet; expected a dense model: "
                        "change the option `model`"
                    )


def check_patterns(patterns: Sequence[str]) -> list[re.Pattern[str]]:
    """The option `drop_tensors`, compiled.

    Raises:
        LitBinqError: no regular expression.
    """
    try:
        return [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise LitBinqError(
            f"drop_tensors: {error.pattern!r} is no regular expression ({first_line(error)}); expected names or "
            "regular expressions of tensors"
        ) from None


def check_finite(model: PreTrainedModel, source: str) -> None:
    """Check every floating-point tensor of the model.

    Raises:
        LitBinqError: a tensor holds NaN or infinity; the message names it.
    """
    for name, tensor in model.state_dict().items():
        # NaN is the least and the greatest value wherever it occurs; one pass, where isfinite takes several.
        if tensor.is_floating_point() and tensor.numel() and not all(e.isfinite() for e in tensor.aminmax()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise LitBinqError(
                f"model {source!r}: weight {name} has {bad} NaN or infinite values of {tensor.numel()}; "
                "expected finite weights: check the checkpoint, or load it with a wider dtype"
            )


def _forget_gguf(model: PreTrainedModel, path: Path) -> None:
    """Make a model that was read from GGUF an ordinary one: its weights are dense by now."""
    forget_quantizer(model, model.dtype)
    model.config.architectures = [type(model).__name__]
    model.config.name_or_path = path.stem


def load_tokenizer(source: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model source; a GGUF file carries its own.

    Args:
        source: as in `load_model`; a packed folder works too.
        revision: branch, tag or commit, for a hub id.

    Raises:
        LitBinqError: no such source, or no usable tokenizer in it.
    """
    path = _local(source)
    if path is None:
        with _one_line_errors("tokenizer", source):
            return AutoTokenizer.from_pretrained(source, **({"revision": revision} if revision else {}))
    if path.is_file():
        with _one_line_errors("tokenizer", source), read_once(path, True) as empty:
            return repaired(AutoTokenizer.from_pretrained(empty, gguf_file=str(path.resolve())), read_gguf(path))
    if not any(path.glob("tokenizer*")) and not any(path.glob("vocab*")):
        raise LitBinqError(
            f"tokenizer {source!r}: the folder has no tokenizer files; expected tokenizer.json or the like "
            "beside config.json"
        )
    with _one_line_errors("tokenizer", source):
        return AutoTokenizer.from_pretrained(path)
