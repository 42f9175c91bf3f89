"""The tokenizer of a folder gives what transformers gives for the same folder."""

import json
import sys
from pathlib import Path

import pytest
from conftest import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lit_binq_onnx.runtime.errors import RunError
from lit_binq_onnx.runtime.generate import encode_prompt
from lit_binq_onnx.runtime.tokens import FolderTokenizer, load_tokenizer

TEXTS = [
    "the cat sat on the mat .",
    "it's , a dog's life ! don't",
    "snow élan 雪 🙂",
    " two  spaces\n\n",
    "<s> in </s> text",
]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% generation %}{{ m['content'] | trim }}{% endgeneration %}\n"
    "{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ bos_token }}{{ {'é': 1} | tojson }}"
    "{% if add_generation_prompt %}\n<|assistant|>{% endif %}"
)


def _wrapped(backend: Tokenizer, **options: object) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=AddedToken("</s>", special=True), **options
    )


def _byte_pairs() -> PreTrainedTokenizerBase:
    """Byte-level pairs, `<s>` before every text, and settings of a training run: cut to 4, filled up to 8."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator(TEXTS * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    return _wrapped(backend, clean_up_tokenization_spaces=True, chat_template=TEMPLATE)


def _word_pieces(tidy: bool) -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.WordPiece(unk_token="?"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["?", "<s>", "</s>"])
    backend.train_from_iterator(TEXTS * 3, trainer)
    return _wrapped(backend, clean_up_tokenization_spaces=tidy)


KINDS = {
    "bytes": byte_tokenizer,
    "pairs": _byte_pairs,
    "words": lambda: _word_pieces(False),
    "tidied words": lambda: _word_pieces(True),
}


@pytest.fixture(scope="module", params=KINDS)
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[FolderTokenizer, PreTrainedTokenizerBase]:
    folder = tmp_path_factory.mktemp("tokenizer")
    KINDS[request.param]().save_pretrained(folder)
    return load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


def _same(ours: FolderTokenizer, theirs: PreTrainedTokenizerBase, text: str) -> None:
    for special in (True, False):
        ids = ours(text, add_special_tokens=special)["input_ids"]
        assert ids == list(theirs(text, add_special_tokens=special)["input_ids"])
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_texts(both: tuple[FolderTokenizer, PreTrainedTokenizerBase]) -> None:
    for text in TEXTS:
        _same(*both, text)
    assert both[0].eos_token_id == both[1].eos_token_id


@settings(deadline=None, max_examples=40)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_text(both: tuple[FolderTokenizer, PreTrainedTokenizerBase], text: str) -> None:
    _same(*both, text)


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json", "several"])
def test_conversations(where: str, tmp_path: Path) -> None:
    _byte_pairs().save_pretrained(tmp_path)
    if where != "chat_template.jinja":
        file = tmp_path / "chat_template.jinja"
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        config["chat_template"] = file.read_text()
        if where == "several":
            other = {"name": "tool_use", "template": "no"}
            config["chat_template"] = [other, {"name": "default", "template": file.read_text()}]
        file.unlink()
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    messages = [{"role": "system", "content": " Be é brief. "}, {"role": "user", "content": '<b>Hi</b> & "you"'}]
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for prompt in (messages, "Hi"):
        assert encode_prompt(ours, prompt, chat=True) == encode_prompt(theirs, prompt, chat=True)
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages, tokenize=False)


def _one_line(said: str, folder: Path) -> None:
    with pytest.raises(RunError, match=said) as caught:
        encode_prompt(load_tokenizer(folder), "Hi", chat=True)
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _one_line("no tokenizer.json in it", tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    _one_line("no chat template", tmp_path)
    template = tmp_path / "chat_template.jinja"
    for source, said in (
        ("{{ raise_exception('roles\nmust alternate') }}", "refuses this .roles must alternate"),
        ("{% if %}", "refuses this"),
        ("{{ messages[0].nothing.at_all }}", "refuses this"),
        ("{{ ''.__class__.__mro__ }}", "refuses this .*unsafe"),
    ):
        template.write_text(source)
        _one_line(said, tmp_path)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    _one_line(r"need jinja2: pip install 'lit-binq\[chat\]'", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    _one_line(r"tokenizer_config\.json'?: damaged", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    _one_line(r"tokenizer\.json'?: damaged", tmp_path)
