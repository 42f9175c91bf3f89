"""Calibration text that the full-precision model writes itself.

Real text for calibration is scarce and is never quite what a model will write; text sampled from the model is endless
and is distributed as the model's own output. It begins with a few tokens of real text, so that it goes wherever that
text goes, or with the BOS token alone.

    texts --sentence starts--> prompts (b, P) --sampling--> pieces (b, L) --joined, cut--> windows (n, T)

Batch j of the pieces depends on the options, the seed and j alone: not on how many batches there are, nor on how many
ranks share them. Every batch is a file of the cache folder, written once.

Legend: b pieces a batch, P prompt tokens, L tokens a piece, n windows, T window length.
"""

import hashlib
import io
import json
import logging
import os
import re
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from lit_binq.data.text import TextSource, encode, read_text
from lit_binq.errors import LitBinqError
from lit_binq.models.load import load_model
from lit_binq.utils.files import write_bytes

log = logging.getLogger(__name__)

JOIN = "\n\n"
"""What stands between two pieces, as between the documents of a text source."""

ROOM = 150
"""Characters that must be left in the line behind a prompt's start: headings and captions begin no text."""

_STARTS = re.compile(r"(?:^|(?<=[.!?] ))(?=\S)", re.MULTILINE)


@dataclass
class SelfGenerated:
    """Text that the full-precision model writes itself, as a part of the calibration windows.

    Attributes:
        share: of all calibration windows, 0 to 1; 0 leaves it out, 1 leaves the texts of `train` to be prompts only.
        prompts: where prompts begin: sources drawn from in proportion to their shares; null for those of `train`.
        prompt_tokens: tokens of a prompt; 0 begins with the BOS token (EOS where there is none) alone.
        length: tokens of a piece, its prompt included; a window holds one or several pieces.
        temperature: of the sampling.
        top_k: sample among so many of the likeliest tokens; 0 for all.
        batch: pieces written together; part of what is written, like the seed.
        seed: of prompts and sampling.
        cache_dir: folder for what was written; `lit_binq/self_generated` in the user's cache folder if empty.
    """

    share: float = 0.0
    prompts: list[TextSource] | None = None
    prompt_tokens: int = 24
    length: int = 512
    temperature: float = 1.0
    top_k: int = 0
    batch: int = 512
    seed: int = 0
    cache_dir: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise LitBinqError(f"self_generated.share: got {self.share}, expected a share from 0 to 1")
        if not 0 <= self.prompt_tokens < self.length:
            raise LitBinqError(
                f"self_generated.prompt_tokens: got {self.prompt_tokens} of a length of {self.length}, expected at "
                "least 0 and fewer than self_generated.length"
            )
        if not 0 < self.temperature < float("inf"):
            raise LitBinqError(f"self_generated.temperature: got {self.temperature}, expected a number above 0")
        for name, least in (("top_k", 0), ("batch", 1)):
            if getattr(self, name) < least:
                raise LitBinqError(f"self_generated.{name}: got {getattr(self, name)}, expected at least {least}")

    def rules(self) -> dict[str, Any]:
        """What decides what is written, for fingerprints: neither the number of windows nor the cache's place."""
        rules = {k: v for k, v in asdict(self).items() if k not in ("share", "cache_dir", "prompts")}
        prompts = None if self.prompts is None else [source.rules() for source in self.prompts]
        return rules | {"prompts": prompts}

    def words(self) -> str:
        """The source in a few words."""
        start = f"{self.prompt_tokens} tokens of real text" if self.prompt_tokens else "the BOS token"
        top = f", top {self.top_k}" if self.top_k else ""
        return (
            f"{self.share:.0%} written by the model from {start} (pieces of {self.length}, temperature "
            f"{self.temperature:g}{top}, seed {self.seed})"
        )


def write_windows(
    options: SelfGenerated,
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[TextSource],
    count: int,
    length: int,
    *,
    revision: str | None = None,
    drop_tensors: Sequence[str] = (),
    device: torch.device | None = None,
    rank: int = 0,
    ranks: int = 1,
    barrier: Callable[[], object] = lambda: None,
) -> Tensor:
    """Windows that the model `source` writes; ranks share the batches and all get every window.

    Args:
        options: how.
        source: the full-precision model, as `load_model` takes it.
        tokenizer: its tokenizer.
        texts: what prompts begin with, unless `options.prompts` says it.
        count: n.
        length: T.
        revision: of a hub model.
        drop_tensors: as `load_model` takes it.
        device: where the model runs; the CPU if None.
        rank: this process.
        ranks: how many there are.
        barrier: waits for all ranks; called where there are several, between writing and reading.

    Returns:
        (n, T) int64.

    Raises:
        LitBinqError: prompts too short, a prompt and BOS both missing, or a cache folder that cannot be written.
    """
    join = encode(tokenizer, JOIN)
    pieces = -(-count * length // (options.length + len(join)))
    batches = -(-pieces // options.batch)
    prompts = _Prompts(options, tokenizer, options.prompts or texts)
    folder = _cache(options) / _key(options, source, revision, tokenizer, prompts, device)
    paths = [folder / f"{j:05d}.npy" for j in range(batches)]
    if missing := [j for j in range(rank, batches, ranks) if not paths[j].is_file()]:
        load = partial(load_model, source, revision=revision, drop_tensors=drop_tensors)
        _write(options, load, tokenizer, prompts, device, {j: paths[j] for j in missing}, rank)
    if ranks > 1:
        barrier()
    rows = torch.cat([_read(path, options) for path in paths])[:pieces]
    return torch.cat((rows, join.expand(len(rows), -1)), 1).flatten()[: count * length].reshape(count, length)


def _cache(options: SelfGenerated) -> Path:
    if options.cache_dir:
        return Path(options.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_binq" / "self_generated"


def _key(
    options: SelfGenerated,
    source: str,
    revision: str | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: "_Prompts",
    device: torch.device | None,
) -> str:
    """Name of the cache's folder: the options, the checkpoint's files, the prompts' text, the kind of device."""
    path = Path(source).expanduser()
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    stamps = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    what = {
        "rules": options.rules(),
        "source": stamps or f"{source}@{revision}",
        "tokens": len(tokenizer),
        "prompts": prompts.digest,
        "device": (device or torch.device("cpu")).type,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


class _Prompts:
    """Beginnings of sentences in texts, drawn at random.

    Args:
        options: how many tokens, and the seed.
        tokenizer: the model's.
        sources: the texts.
    """

    def __init__(self, options: SelfGenerated, tokenizer: PreTrainedTokenizerBase, sources: list[TextSource]) -> None:
        self.options, self.tokenizer = options, tokenizer
        self.texts = [read_text(source) for source in sources] if options.prompt_tokens else []
        self.shares = np.array([source.share for source in sources], np.float64)
        self.starts = [_starts(text) for text in self.texts]
        for source, starts in zip(sources, self.starts, strict=False):
            if not starts:
                raise LitBinqError(
                    f"self_generated.prompts: text {source.path!r} has no sentence with {ROOM} characters behind its "
                    "start; expected running text: give another source"
                )
        digest = hashlib.sha256()
        for text in self.texts:
            digest.update(hashlib.sha256(text.encode()).digest())
        self.digest = digest.hexdigest()

    def batch(self, j: int) -> Tensor:
        """(b, max(P, 1)) int64, the prompts of batch j."""
        options = self.options
        if not options.prompt_tokens:
            start = self.tokenizer.bos_token_id
            start = self.tokenizer.eos_token_id if start is None else start
            if start is None:
                raise LitBinqError(
                    "self_generated.prompt_tokens: got 0, but the tokenizer has neither a BOS nor an EOS token; "
                    "expected at least 1"
                )
            return torch.full((options.batch, 1), int(start))
        draw = np.random.default_rng([options.seed, j])
        rows: list[list[int]] = []
        tries = 0
        while len(rows) < options.batch:
            i = draw.choice(len(self.texts), p=self.shares / self.shares.sum())
            at = self.starts[i][draw.integers(len(self.starts[i]))]
            piece = self.texts[i][at : at + 16 * options.prompt_tokens]
            ids = self.tokenizer(piece, add_special_tokens=False, verbose=False).input_ids[: options.prompt_tokens]
            if len(ids) == options.prompt_tokens:
                rows.append(list(ids))
            tries += 1
            if tries > 100 * options.batch:
                raise LitBinqError(
                    f"self_generated.prompt_tokens: got {options.prompt_tokens}, but the texts end sooner behind their "
                    "sentence starts; lower it or give longer texts"
                )
        return torch.tensor(rows)


def _starts(text: str) -> list[int]:
    """Where a prompt may begin: lines and sentences with `ROOM` characters of their line behind them."""
    ends = [match.start() for match in re.finditer(r"\n", text)] + [len(text)]
    return [
        at
        for match in _STARTS.finditer(text)
        if ends[bisect_left(ends, (at := match.start()))] - at >= ROOM
    ]  # fmt: skip


def _write(
    options: SelfGenerated,
    load: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    prompts: _Prompts,
    device: torch.device | None,
    paths: dict[int, Path],
    rank: int,
) -> None:
    """Write the batches `paths` names."""
    device = device or torch.device("cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load(dtype=dtype)
    torch.nn.Module.to(model, device)
    # Special tokens end a text or begin a turn; padded rows of the embedding have no token.
    size = model.config.get_text_config(decoder=True).vocab_size
    banned = torch.tensor(sorted({*tokenizer.all_special_ids, *range(len(tokenizer), size)}), device=device)
    began, said = time.monotonic(), time.monotonic()
    for done, (j, path) in enumerate(paths.items(), 1):
        generator = torch.Generator(device).manual_seed((options.seed * 1_000_003 + j) % 2**63)
        start = prompts.batch(j).to(device)
        new = options.length - (start.shape[1] if options.prompt_tokens else 0)
        piece = sample(
            model, start, new, temperature=options.temperature, top_k=options.top_k, banned=banned, generator=generator
        )
        buffer = io.BytesIO()
        np.save(buffer, piece[:, -options.length :].cpu().numpy().astype(np.int32), allow_pickle=False)
        write_bytes(path, buffer.getvalue())
        now = time.monotonic()
        if rank == 0 and (now - said > 10 or done == len(paths)):
            said, tokens = now, options.batch * options.length
            left = int((now - began) / done * (len(paths) - done))
            log.info(
                "the model writes calibration text: %.2fM of %.2fM tokens, %.0fk tokens/s, %d:%02d left",
                *(done * tokens / 1e6, len(paths) * tokens / 1e6, done * tokens / (now - began) / 1e3),
                *divmod(left, 60),
            )


def _read(path: Path, options: SelfGenerated) -> Tensor:
    """(b, L) int64: one batch of the cache."""
    try:
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise LitBinqError(
            f"self_generated.cache_dir: {str(path)!r} cannot be read ({error}); expected what an earlier run wrote: "
            "remove the file"
        ) from error
    if rows.shape != (options.batch, options.length) or rows.dtype != np.int32:
        raise LitBinqError(
            f"self_generated.cache_dir: {str(path)!r} holds {rows.dtype} {rows.shape}, expected int32 "
            f"{(options.batch, options.length)}: remove the file"
        )
    return torch.from_numpy(rows.astype(np.int64))


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    prompts: Tensor,
    new: int,
    *,
    temperature: float,
    top_k: int,
    banned: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Continue prompts by sampling; nothing ends a text early.

    Args:
        model: in evaluation mode.
        prompts: (b, P) int64 on its device.
        new: tokens to write.
        temperature: divides the logits.
        top_k: tokens to sample among; 0 for all.
        banned: token numbers never written.
        generator: on the model's device.

    Returns:
        (b, P + new) int64.
    """
    cache, ids = DynamicCache(config=model.config), prompts
    out = [prompts]
    for _ in range(new):
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
        logits[:, banned] = -torch.inf
        logits /= temperature
        if top_k:
            logits.masked_fill_(logits < logits.topk(min(top_k, logits.shape[1])).values[:, -1:], -torch.inf)
        ids = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        out.append(ids)
    return torch.cat(out, 1)
