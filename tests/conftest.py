"""Shared fixtures: tiny random models, a byte-level tokenizer made on the spot, text. Nothing is fetched."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach for the network
# Before torch is imported: tiny tensors gain nothing from threads, and threads that wait for a busy core cost minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from comparing import BASE, Fits
from lit_binq.compare import runner as compare


def pytest_configure(config: pytest.Config) -> None:
    """Exceptions from "warnings are errors", each with its reason."""
    for rule in (
        # Lightning's own use of torch's tree functions; nothing of ours can change it.
        "ignore:.*isinstance.treespec, LeafSpec.*is deprecated:FutureWarning",
        # Advice on loader workers; our windows are in memory already, a worker would only copy them.
        "ignore:.*does not have many workers.*",
    ):
        config.addinivalue_line("filterwarnings", rule)


@pytest.hookimpl(tryfirst=True)  # before pytest asks for marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked `grid(n)` the first n cases show the behaviour; the others are slow."""
    seen: Counter[str] = Counter()
    for item in items:
        if grid := item.get_closest_marker("grid"):
            seen[name := item.nodeid.partition("[")[0]] += 1
            if seen[name] > grid.args[0]:
                item.add_marker(pytest.mark.slow)


ROOT = Path(__file__).parents[1]
HELPERS = ROOT / "tests" / "helpers"
"""Scripts that tests start in processes of their own, and what tests share."""

VOCAB = 260
"""All 256 bytes and four special tokens."""

ARCHITECTURES = ("llama", "opt", "qwen2")


def tiny_config(kind: str, *, tied: bool = True, blocks: int = 2) -> PreTrainedConfig:
    """Width 32, MLP 48, odd enough to be telling: grouped heads (llama, qwen2), biases (opt, qwen2)."""
    ids = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    if kind == "opt":
        return OPTConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=blocks,
            num_attention_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=tied,
            **ids,
        )
    made = {"llama": LlamaConfig, "qwen2": Qwen2Config}[kind]
    return made(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        **ids,
    )


def tiny_model(kind: str, *, tied: bool = True, blocks: int = 2, seed: int = 0) -> PreTrainedModel:
    """A random model in float32 and evaluation mode, its weights large enough that logits differ visibly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(kind, tied=tied, blocks=blocks), dtype=torch.float32)
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.data = 1 + 0.1 * noise if "norm.weight" in name else 0.15 * noise
    return model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token; bos 256, eos 257, pad 258, unk 259. Encoding and decoding lose nothing."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<bos>", "<eos>", "<pad>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate(alphabet + special)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture(params=ARCHITECTURES)
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """One tiny random model of each architecture, tied embeddings."""
    return tiny_model(request.param)


@pytest.fixture
def llama() -> PreTrainedModel:
    """A tiny random LLaMA of two blocks, tied embeddings."""
    return tiny_model("llama")


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """`tiny_model` itself: make_model(kind, tied=..., blocks=..., seed=...)."""
    return tiny_model


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The byte-level tokenizer."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tokenizer_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is a model source with that tokenizer: config.json and tokenizer files, no weights."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    tiny_config("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 9,000 bytes of text with some structure to it; one token a byte with the tokenizer above."""
    words = (
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "and",
        "saw",
        "the",
        "dog",
        "run",
        "by",
        "twice",
        "in",
        "1984",
    )
    lines = (" ".join(words[(i * j) % len(words)] for j in range(1, 11)) + f" {i}.\n" for i in range(200))
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def model_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaMA checkpoint folder with its tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make_source(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """make_source(kind, **options of tiny_model): write a tiny checkpoint with its tokenizer; returns its folder."""

    def make(kind: str = "llama", **options: Any) -> Path:
        folder = tmp_path / f"{kind}-model"
        tiny_model(kind, **options).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that commands run in, with a base file and the texts it names."""
    monkeypatch.chdir(tmp_path)
    for name in ("train.txt", "wiki.txt", "c4.txt", "model.gguf"):
        Path(name).write_text(name)
    Path("base.yaml").write_text(yaml.safe_dump(BASE, sort_keys=False))
    return tmp_path


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Fits:
    """A stand-in for the fits that a comparison runs."""
    stand_in = Fits()
    monkeypatch.setattr(compare, "fit", stand_in)
    return stand_in
