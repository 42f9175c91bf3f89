"""A GGUF file's tokenizer, with what the file states and transformers loses; the same again once saved and reloaded.

transformers builds the tokenizer of a GGUF file by rules of its own and puts it into the class that belongs to the
architecture. That class, when it reads the saved tokenizer.json again, keeps only vocabulary, merges and added tokens
of it and takes normalizer and splitting rule from its own code: calibrated with one tokenizer, run with another. So
the two are made to agree here.
"""

import logging
from typing import Any

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lit_binq.errors import LitBinqError
from lit_binq.models.gguf_files import GgufHead

log = logging.getLogger(__name__)

_DIGITS_ONE_BY_ONE = ("smollm", "starcoder", "refact", "codeshell", "command-r", "exaone", "minerva-7b")
"""Values of `tokenizer.ggml.pre`, GGUF's name of a splitting rule: GPT-2's rule after digits are split one by one.

transformers does not know these and falls back to GPT-2's rule, which keeps a run of digits together.
"""
_GPT2_RULE = (
    *("gpt-2", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat", "a.x-4.0", "mellum"),
    *("modern-bert", "mpt", "olmo", "jais", "trillion", "granite-docling"),
)
"""Values for which GPT-2's rule is right. Source of both: llama.cpp, src/llama-vocab.cpp."""

_SPECIAL = {
    "bos_token_id": "bos_token",
    "eos_token_id": "eos_token",
    "unknown_token_id": "unk_token",
    "padding_token_id": "pad_token",
}
"""Key under `tokenizer.ggml.` -> the tokenizer's attribute that holds that token."""


def repaired(tokenizer: PreTrainedTokenizerBase, head: GgufHead) -> PreTrainedTokenizerBase:
    """The tokenizer that transformers made of a file, with what it lost.

    transformers 5.17 takes the BOS token for EOS and drops the padding token; later versions do not.

    Args:
        tokenizer: is changed.
        head: the file's.

    Returns:
        The tokenizer, or one of the class without rules of its own around the same vocabulary.

    Raises:
        LitBinqError: the file names a special token that its vocabulary does not have.
    """
    backend: Any = tokenizer.backend_tokenizer
    rule = head.get("tokenizer.ggml.pre")
    if rule in _DIGITS_ONE_BY_ONE:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif head.get("tokenizer.ggml.model") == "gpt2" and rule not in _GPT2_RULE and _is_plain_gpt2(backend):
        log.warning(
            "GGUF file %s: text is split before the merges by a rule of the name %r, which is not known here; GPT-2's "
            "is used, token ids may differ from the model's own: give the tokenizer's Hugging Face folder instead",
            *(head.path.name, rule),
        )
    tokenizer = _as_reloaded(tokenizer)
    for key, name in _SPECIAL.items():
        if (index := head.get(f"tokenizer.ggml.{key}")) is not None:
            if not 0 <= index < len(tokenizer):
                raise LitBinqError(
                    f"GGUF file {str(head.path)!r}: {key} is {index}, and the vocabulary has {len(tokenizer)} tokens; "
                    "expected the number of one of them: fetch or convert the file again"
                )
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(index))
    tokenizer.name_or_path = head.path.stem
    tokenizer.clean_up_tokenization_spaces = False  # it would drop spaces before punctuation in decoded text
    return tokenizer


def _state(part: Any) -> Any:
    """A normalizer or pre-tokenizer as something that can be compared."""
    return part if part is None else part.__getstate__()


def _is_plain_gpt2(backend: Any) -> bool:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return bool(_state(backend.pre_tokenizer) == _state(plain))


def _as_reloaded(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Make a tokenizer of a class with rules of its own agree with what that class makes of it when it is reloaded.

    The class's normalizer is the model's own (Qwen2: NFC, which a GGUF file cannot say). A splitting rule is what the
    file says: where the class has another, the tokenizer goes into the class that has none.
    """
    kind: Any = type(tokenizer)
    if kind is PreTrainedTokenizerFast:
        return tokenizer
    own, backend = kind().backend_tokenizer, tokenizer.backend_tokenizer
    if _state(own.normalizer) != _state(backend.normalizer):
        backend.normalizer = own.normalizer
    if _state(own.pre_tokenizer) == _state(backend.pre_tokenizer):
        return tokenizer
    special = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    general: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=tokenizer.chat_template,
        padding_side=tokenizer.padding_side,
        model_input_names=tokenizer.model_input_names,
        **special,
    )
    return general
