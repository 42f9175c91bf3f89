"""Texts: exact reading, parts of them, styles, tokens."""

import json
import logging

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_binq.data.module import TextSource
from lit_binq.data.normalize import normalize
from lit_binq.data.text import encode, read_text
from lit_binq.errors import LitBinqError
from lit_binq.models.load import load_tokenizer


@pytest.mark.parametrize("suffix", [".txt", ".raw", ".utf8"])
@pytest.mark.parametrize("content", ["a\r\nb\rc\n\n\n", "\ufeffwith a mark \u2028 ü 漢 🙂 \t", " \n = Title = \n \n"])
def test_plain_text_is_read_byte_for_byte(suffix, content, tmp_path):
    path = tmp_path / f"text{suffix}"
    path.write_bytes(content.encode())
    assert read_text(TextSource(str(path), join="never used")).encode() == content.encode()


def test_a_folder_is_joined_in_order_of_names(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(name * 3)
    assert read_text(TextSource(str(tmp_path), join="|")) == "aaa|bbb|ccc"
    assert read_text(TextSource(str(tmp_path), join="|", limit_documents=2)) == "aaa|bbb"


def test_what_a_folder_holds_besides_is_named(tmp_path, caplog):
    for name in ("a.txt", "b.TXT", "c.json"):
        (tmp_path / name).write_text(name)
    (tmp_path / "folder").mkdir()
    assert read_text(TextSource(str(tmp_path))) == "a.txt"
    assert "3 of 4 entries are no .txt" in caplog.text
    assert "(first: b.TXT)" in caplog.text
    assert TextSource(str(tmp_path)).words() == f"{tmp_path} verbatim"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_are_joined(suffix, tmp_path):
    path = tmp_path / f"rows{suffix}"
    rows = [{"text": "one\n", "body": "x"}, {"text": None, "body": "y"}, {"text": "three", "body": "z"}]
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    assert read_text(TextSource(str(path))) == "one\n\n\n\n\nthree"
    assert read_text(TextSource(str(path), join="", field="body")) == "xyz"
    assert read_text(TextSource(str(path), join="-", field="body", limit_documents=2)) == "x-y"
    with pytest.raises(LitBinqError, match=r"no column 'nope', expected one of 'text', 'body': set the option `field`"):
        read_text(TextSource(str(path), field="nope"))


def test_hub_sets_are_asked_for_by_name_and_split(monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return [{"text": "a"}, {"text": "b"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert read_text(TextSource("some/set", "config", "validation")) == "a\n\nb"
    assert read_text(TextSource("some/set", limit_documents=1)) == "a"
    assert asked == [
        (("some/set", "config"), {"split": "validation", "streaming": False}),
        (("some/set", None), {"split": "train", "streaming": True}),
    ]


def refused(source: TextSource, match: str) -> None:
    with pytest.raises(LitBinqError, match=match) as caught:
        read_text(source)
    assert "\n" not in str(caught.value)


def test_bad_sources_give_one_line(tmp_path):
    for path in ("/no/such.txt", "./nothing", "nothing.jsonl"):
        refused(TextSource(path), "no such file or folder")
    refused(TextSource("nobody/no-such-set"), "nobody/no-such-set.* cannot be loaded")
    for content in (b"", b" \n\t\r\n"):
        (tmp_path / "empty.txt").write_bytes(content)
        refused(TextSource(str(tmp_path / "empty.txt")), "is empty")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    refused(TextSource(str(tmp_path / "latin.txt")), "byte 3 is not UTF-8")
    (tmp_path / "table.csv").write_text("a,b")
    refused(TextSource(str(tmp_path / "table.csv")), r"expected files of one type of \.txt")
    (tmp_path / "more.jsonl").write_text('{"text": 1}\n')
    refused(TextSource(str(tmp_path)), "files of several types")
    refused(TextSource(str(tmp_path / "more.jsonl")), "holds int, expected text")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"te')
    refused(TextSource(str(tmp_path / "broken.jsonl")), r"broken\.jsonl.*cannot be (read|loaded)")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    refused(TextSource(str(tmp_path / "broken.parquet")), r"broken\.parquet.*cannot be (read|loaded)")
    with pytest.raises(LitBinqError, match="limit_documents"):
        TextSource("x", limit_documents=0)


def test_encoding_long_text_is_silent_and_adds_nothing(tokenizer_folder, caplog):
    tokenizer = load_tokenizer(str(tokenizer_folder))
    tokenizer.model_max_length = 8
    logging.getLogger("transformers").propagate = True
    try:
        ids = encode(tokenizer, "a long text, " * 50)
    finally:
        logging.getLogger("transformers").propagate = False
    assert ids.dtype == torch.int64
    assert tokenizer.decode(ids) == "a long text, " * 50
    assert caplog.text == ""


@settings(deadline=None, max_examples=60)
@given(text=st.text(st.sampled_from("ab\n"), min_size=1, max_size=60).filter(str.strip), cut=st.floats(0.01, 0.99))
def test_parts_of_a_text_meet_without_overlap(tmp_path_factory, text: str, cut: float) -> None:
    path = tmp_path_factory.mktemp("parts") / "text.txt"
    path.write_text(text, encoding="utf-8")
    first, second = read_text(TextSource(str(path), end=cut)), read_text(TextSource(str(path), begin=cut))
    assert first + second == text
    assert not first or not second or first.endswith("\n")  # cut at a line's start only


def test_lower_case_is_a_rule_of_its_own(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The End\n", encoding="utf-8")
    plain, lower = TextSource(str(path)), TextSource(str(path), normalization="lower")
    assert read_text(lower) == "the end\n"
    assert plain.rules() != lower.rules()
    assert "normalization lower" in lower.words()


@pytest.mark.parametrize(
    "wrong", [{"begin": 0.5, "end": 0.5}, {"begin": -0.1}, {"end": 1.1}, {"share": 0.0}, {"normalization": "upper"}]
)
def test_impossible_parts_are_refused(wrong):
    with pytest.raises(LitBinqError, match="expected"):
        TextSource("x.txt", **wrong)


def test_lines_can_be_left_out(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text('<doc id="1">\nThe End\n</doc>\nNot a <doc> line\n', encoding="utf-8")
    source = TextSource(str(path), skip_lines="</?doc")
    assert read_text(source) == "The End\nNot a <doc> line\n"
    assert "</?doc" in source.words()


def test_treebank_style():
    text = "Mr. Smith doesn't own 1,234.5 shares (yet). \"We'll see,\" he said; U.S. stocks fell 3%!\nThe End"
    assert normalize(text, "treebank") == (
        " mr. smith does n't own N shares yet \n we 'll see he said u.s. stocks fell N % \n the end \n"
    )
    assert normalize(text, "verbatim") == text


def test_treebank_style_keeps_frequent_words_only(monkeypatch):
    monkeypatch.setattr("lit_binq.data.normalize.VOCABULARY", 2)
    assert normalize("a b a c b a 7", "treebank") == " a b a <unk> b a N \n"
