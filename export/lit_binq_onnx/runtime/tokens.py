"""Text to tokens and back: the tokenizer of an exported folder through the package `tokenizers` alone.

It gives what transformers gives for the same folder, whose tokenizer.json holds all of the tokenization: normalization,
merges, which special tokens are put around a text. tokenizer_config.json adds their names and the chat template.
"""

import json
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer

from lit_binq_onnx.runtime.errors import RunError

_TIDIED = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
           (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))  # fmt: skip
"""What `clean_up_tokenization_spaces` means, in this order."""


class TextTokenizer(Protocol):
    """What writing text needs of a tokenizer. `FolderTokenizer` is one, and so are those of transformers."""

    eos_token_id: Any
    chat_template: Any

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Any:
        """Token numbers of a text, under the key "input_ids"."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> Any:
        """Text of token numbers."""

    def apply_chat_template(self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool) -> Any:
        """A conversation as the text that the model was trained on."""


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file.

    Raises:
        RunError: it is damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise RunError(f"tokenizer {str(path)!r}: damaged ({error}), expected JSON: export again") from error
    return value if isinstance(value, dict) else {}


class FolderTokenizer:
    """The tokenizer of a folder.

    Args:
        folder: with tokenizer.json and, where there is one, tokenizer_config.json.

    Attributes:
        eos_token_id: token that ends a text, None where no file names one.
        chat_template: Jinja source, None where there is none.

    Raises:
        RunError: no tokenizer.json, or one that cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise RunError(
                f"tokenizer {str(folder)!r}: no tokenizer.json in it, expected one: run the model from Python with a "
                "tokenizer of transformers instead, or export a model whose tokenizer has this file"
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises plain exceptions
            reason = " ".join(str(error).split())[:300]
            raise RunError(
                f"tokenizer {str(path)!r}: damaged ({reason}), expected a whole one: export again"
            ) from error
        # Stored settings of some training run; a prompt is neither cut nor filled up.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = _read(self.folder / "tokenizer_config.json")
        self._tokenizer.encode_special_tokens = bool(config.get("split_special_tokens"))
        named = {**_read(self.folder / "special_tokens_map.json"), **config}
        # A name is a string, or an object with the string and how it is matched.
        names = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
        self._special = {key: str(v) for key, v in names.items() if key.endswith("_token") and isinstance(v, str)}
        end = self._special.get("eos_token")
        self.eos_token_id: int | None = None if end is None else self._tokenizer.token_to_id(end)
        self.chat_template = _chat_template(self.folder, config)
        # Made for WordPiece; byte-pair encoders keep spaces of their own, which it would eat.
        forced = config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
        bpe = type(self._tokenizer.model).__name__ == "BPE"
        self._tidy = bool(config.get("clean_up_tokenization_spaces")) and (not bpe or bool(forced))

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """Token numbers, under the key "input_ids"."""
        return {"input_ids": list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)}

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token numbers."""
        text = str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))
        for old, new in _TIDIED if self._tidy else ():
            text = text.replace(old, new)
        return text

    def apply_chat_template(
        self, conversation: Sequence[dict[str, str]], *, tokenize: bool = False, add_generation_prompt: bool = False
    ) -> str:
        """A conversation as text, in the form the model was trained on.

        Args:
            conversation: {"role": ..., "content": ...}, oldest first.
            tokenize: False; the text is tokenized by who asks.
            add_generation_prompt: end with what begins the model's answer.

        Raises:
            RunError: no template or no jinja2, or the template refuses the conversation.
        """
        if not isinstance(self.chat_template, str):
            raise RunError(f"chat: {str(self.folder)!r} has no chat template, expected one: leave out `chat`")
        messages = [{key: value for key, value in message.items() if value is not None} for message in conversation]
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        return _render(self.chat_template, {**self._special, **given})


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The template in a file of its own or in tokenizer_config.json; of several the one called `default`."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    stated = config.get("chat_template") or _read(folder / "chat_template.json").get("chat_template")
    if isinstance(stated, list):
        stated = {entry.get("name"): entry.get("template") for entry in stated}.get("default")
    return stated if isinstance(stated, str) else None


def _render(template: str, values: dict[str, Any]) -> str:
    """A chat template with its values, in a sandbox: it came with the model.

    Raises:
        RunError: no jinja2, or the template fails.
    """
    try:
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise RunError("chat: chat templates need jinja2: pip install 'lit-binq[chat]'") from None

    class Generation(Extension):
        """`{% generation %}`, which marks the model's own words for training, leaves them as they are."""

        tags = {"generation"}  # noqa: RUF012  # as jinja2 has it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def as_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:  # jinja2's own escapes for HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    sandbox.filters["tojson"] = as_json
    sandbox.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    try:
        return sandbox.from_string(template).render(**values)
    except (TemplateError, TypeError, ValueError, LookupError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"chat: the model's chat template refuses this ({reason}): leave out `chat`") from error


def load_tokenizer(folder: str | Path) -> FolderTokenizer:
    """The tokenizer of an exported folder; see `FolderTokenizer`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one text at a time; quiet where a process forks later
    return FolderTokenizer(folder)
