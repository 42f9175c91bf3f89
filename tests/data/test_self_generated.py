"""Text that the model writes itself: what is sampled, who writes it, what is kept, how it is mixed."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fitting import fit, stored
from lit_binq.data import self_generated
from lit_binq.data.module import CalibrationData, TextSource
from lit_binq.data.self_generated import SelfGenerated, sample, write_windows
from lit_binq.errors import LitBinqError
from lit_binq.models.load import load_tokenizer

T = 32


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    """Long lines of short sentences, a heading between them."""
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    lines = [" ".join(f"Sentence {i} of line {k} ends here." for i in range(12)) for k in range(20)]
    path.write_text(" = Heading = \n" + "\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def write(model_folder, prose, tmp_path):
    """write(count, rank=..., ranks=..., **options): windows of T tokens, cached under the test's own folder."""

    def made(count: int, *, rank: int = 0, ranks: int = 1, barrier=lambda: None, **options) -> torch.Tensor:
        settings = {"share": 1.0, "length": 24, "prompt_tokens": 4, "batch": 3, "cache_dir": str(tmp_path / "cache")}
        return write_windows(
            SelfGenerated(**settings | options),
            str(model_folder),
            load_tokenizer(str(model_folder)),
            [TextSource(str(prose))],
            count,
            T,
            rank=rank,
            ranks=ranks,
            barrier=barrier,
        )

    return made


@torch.no_grad()
def test_the_coldest_sampling_is_the_likeliest_token_of_a_whole_pass(llama):
    prompts = torch.tensor([[3, 4, 5], [9, 8, 7]])
    banned = torch.tensor([256, 257])
    out = sample(llama, prompts, 6, temperature=1e-6, top_k=0, banned=banned, generator=torch.Generator())
    expected = prompts
    for _ in range(6):
        logits = llama(input_ids=expected, use_cache=False).logits[:, -1]
        logits[:, banned] = -torch.inf
        expected = torch.cat((expected, logits.argmax(-1, keepdim=True)), 1)
    assert torch.equal(out, expected)


@torch.no_grad()
@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.5, 0), (2.0, 0), (1.0, 5)])
def test_frequencies_follow_the_tempered_distribution(llama, temperature, top_k):
    n = 20_000
    prompts = torch.tensor([[3, 4, 5]]).expand(n, -1)
    banned = torch.arange(250, 260)
    generator = torch.Generator().manual_seed(1)
    out = sample(llama, prompts, 1, temperature=temperature, top_k=top_k, banned=banned, generator=generator)
    logits = llama(input_ids=prompts[:1], use_cache=False).logits[0, -1, :250].double() / temperature
    p = logits.softmax(0)
    if top_k:
        kept = p.argsort(descending=True)[:top_k]
        p = torch.zeros_like(p).index_fill_(0, kept, 1.0) * p
        p /= p.sum()
    counts = torch.bincount(out[:, -1], minlength=250).double()
    assert len(counts) == 250
    assert counts[p == 0].sum() == 0
    # Pearson's statistic over tokens expected at least five times: mean k, variance 2k
    often = p * n >= 5
    chi = ((counts - p * n)[often].square() / (p * n)[often]).sum()
    assert chi < often.sum() + 5 * (2 * often.sum()) ** 0.5


def test_windows_do_not_depend_on_ranks_nor_on_how_many_are_asked_for(write, tmp_path):
    alone = write(7)
    assert alone.shape == (7, T)
    assert alone.dtype == torch.int64
    two = {"ranks": 2, "cache_dir": str(tmp_path / "two")}
    with pytest.raises(LitBinqError, match="cannot be read"):  # the other rank's batches are not there yet
        write(7, rank=1, **two)
    assert torch.equal(write(7, rank=0, **two), alone)
    assert torch.equal(write(3, cache_dir=str(tmp_path / "fewer")), alone[:3])


def test_what_was_written_is_read_again(write, monkeypatch):
    first = write(4)
    monkeypatch.setattr(self_generated, "load_model", lambda *_, **__: pytest.fail("the model was loaded again"))
    assert torch.equal(write(4), first)
    monkeypatch.undo()
    for other in ({"seed": 1}, {"temperature": 0.5}, {"prompt_tokens": 5}, {"top_k": 3}):
        assert not torch.equal(write(4, **other), first)


def test_a_damaged_cache_is_named(write, tmp_path):
    write(4)
    path = next((tmp_path / "cache").glob("*/00000.npy"))
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(LitBinqError, match=r"cache_dir: .*00000\.npy' cannot be read"):
        write(4)
    np.save(path, np.zeros((2, 2), np.int32))
    with pytest.raises(LitBinqError, match=r"holds int32 \(2, 2\), expected int32 \(3, 24\)"):
        write(4)


def test_prompts_are_sentence_starts_and_no_special_token_is_written(write, tokenizer):
    windows = write(12)
    stream = windows.flatten()
    assert int(stream.max()) < 256
    for piece in stream[: len(stream) // 26 * 26].reshape(-1, 26):  # 24 tokens, then two line breaks
        assert tokenizer.decode(piece[24:]) == "\n\n"
        assert tokenizer.decode(piece[:4]) == "Sent"


def test_from_bos_alone(write, model_folder):
    windows = write(3, prompt_tokens=0, temperature=1e-6)
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[256]])).logits[0, -1]
    assert int(windows[0, 0]) == int(logits[:256].argmax())


def test_the_share_of_the_windows(model_folder, prose, tmp_path):
    def data(share: float, **options) -> CalibrationData:
        made = CalibrationData(
            str(model_folder),
            train=[TextSource(str(prose)), TextSource(str(prose), share=2.0)],
            window_length=16,
            windows=20,
            held_out=0.1,
            evaluation={},
            self_generated=SelfGenerated(
                share, length=24, prompt_tokens=4, batch=8, cache_dir=str(tmp_path / "cache"), **options
            ),
        )
        made.setup("fit")
        return made

    real, mixed, alone = data(0.0), data(0.4), data(1.0)
    known = {tuple(w) for w in torch.cat((real.train_windows, real.held_out_windows)).tolist()}

    def count(made: CalibrationData) -> int:
        return sum(tuple(w) in known for w in torch.cat((made.train_windows, made.held_out_windows)).tolist())

    assert [count(made) for made in (real, mixed, alone)] == [20, 12, 0]
    assert len(alone.train_windows) + len(alone.held_out_windows) == 20
    assert "40% written by the model from 4 tokens of real text" in mixed.describe()
    prints = {made.fingerprint() for made in (real, mixed, alone, data(0.4, temperature=0.9))}
    assert len(prints) == 4
    assert data(0.4).fingerprint() == mixed.fingerprint()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"share": 1.5}, "self_generated.share: got 1.5, expected a share from 0 to 1"),
        ({"share": 0.5, "prompt_tokens": 600}, "self_generated.prompt_tokens: got 600 of a length of 512"),
        ({"share": 0.5, "temperature": 0.0}, "self_generated.temperature: got 0.0, expected a number above 0"),
        ({"share": 0.5, "batch": 0}, "self_generated.batch: got 0, expected at least 1"),
    ],
)
def test_options_out_of_range(options, match):
    with pytest.raises(LitBinqError, match=match):
        SelfGenerated(**options)


def test_texts_without_sentences_are_refused(write, tmp_path, model_folder):
    short = tmp_path / "short.txt"
    short.write_text("one\ntwo\n")
    with pytest.raises(LitBinqError, match="no sentence with 150 characters behind its start"):
        write(2, prompts=[TextSource(str(short))])
    long = tmp_path / "long.txt"
    long.write_text("word " * 40)
    with pytest.raises(LitBinqError, match=r"prompt_tokens: got 300, but the texts end sooner"):
        write(2, prompts=[TextSource(str(long))], prompt_tokens=300, length=310)


def test_a_fit_on_nothing_but_what_the_model_writes(model_folder, prose, tmp_path):
    generated = SelfGenerated(1.0, length=24, prompt_tokens=4, batch=8, cache_dir=str(tmp_path / "cache"))
    module = fit(model_folder, prose, tmp_path / "packed", data={"self_generated": generated})
    assert stored(tmp_path / "packed")
    assert all(record.after <= record.before for record in module.records)


def test_ranks_wait_between_writing_and_reading(write, monkeypatch):
    order: list[str] = []
    writing, reading = self_generated._write, self_generated._read
    monkeypatch.setattr(self_generated, "_write", lambda *a: (order.append("write"), writing(*a))[1])
    monkeypatch.setattr(self_generated, "_read", lambda *a: (order.append("read"), reading(*a))[1])
    write(2, ranks=2, barrier=lambda: order.append("wait"), batch=8)
    assert order == ["write", "wait", "read"]
