"""Windows of tokens for calibration and evaluation, by rules that are printed and hashed.

    documents --join--> text --tokenize--> ids --> windows (n, T) --> train | held out --> ranks

`lit_binq.data.text` makes windows out of a source; no special tokens are added. Then:

- `take` says which windows are used: the first ones, or a random choice in random order. With `bos` a window
  is the BOS token and T - 1 ids of the text.
- Several sources give windows in proportion to their `share` (largest remainders), each spread evenly over the list.
- The model itself may write a part of the windows (lit_binq.data.self_generated), spread evenly likewise.
- The last windows of that list are held out: with `take: first` the end of the text that was read, with
  `take: random` a random choice from all of it.
- Rank r of R gets windows r, r + R, ... Train and held-out windows are equally many on every rank, what is
  left over is dropped. Evaluation windows are dealt alike, but none is dropped.
- Evaluation: the first `eval_windows` windows of `eval_length` ids, no BOS.

Legend: n windows, T window length in tokens, b batch.
"""

import hashlib
import json
import logging
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import PreTrainedTokenizerBase

from lit_binq.data.overlap import WORDS, shared_sequences
from lit_binq.data.self_generated import SelfGenerated, write_windows
from lit_binq.data.text import WIKITEXT2, WIKITEXT2_TEST, Take, TextSource, encode, make_windows, read_text
from lit_binq.errors import LitBinqError
from lit_binq.models.load import load_tokenizer

log = logging.getLogger(__name__)

__all__ = ["CalibrationData", "TextSource", "make_windows"]

NOT_GENERATED = SelfGenerated()


class _Windows(Dataset[dict[str, Any]]):
    """Rows of a tensor (n, T) as {"input_ids": (T,), "index": row}."""

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.windows[index], "index": index}


def _loader(windows: Tensor, batch_size: int) -> DataLoader[dict[str, Any]]:
    """A loader over windows that belong to this rank already, in order.

    The sampler deals to one replica, which is to say not at all; but Lightning leaves a DistributedSampler in place,
    while it would replace any other and so shard a second time.
    """
    rows = _Windows(windows)
    sampler: DistributedSampler[dict[str, Any]] = DistributedSampler(rows, num_replicas=1, rank=0, shuffle=False)
    return DataLoader(rows, batch_size=batch_size, sampler=sampler, num_workers=0)


class CalibrationData(LightningDataModule):
    """Calibration windows and evaluation sets; the rules stand at the head of this file.

    Args:
        tokenizer: model source whose tokenizer is used: hub id, folder or .gguf file.
        train: calibration text: one source, or several mixed evenly; the default is the train split of
            WikiText-2 (raw).
        window_length: T, tokens a calibration window.
        windows: calibration windows over all sources and ranks, held-out ones included.
        take: which windows of a source: the first ones, or a random choice.
        seed: seed of the random choice and of the order within an epoch.
        bos: begin each calibration window with the BOS token.
        held_out: share of the calibration windows held out for early stopping; at least one if above 0.
        batch_size: calibration windows a step, on each rank.
        evaluation: evaluation sets by name; the default is the test split of WikiText-2.
        eval_windows: windows an evaluation set, over all ranks; null for all there are.
        eval_length: tokens an evaluation window.
        eval_batch_size: evaluation windows a step, on each rank.
        revision: branch, tag or commit of the tokenizer, for a hub id.
        self_generated: windows that the full-precision model writes itself.
        drop_tensors: tensors that this model's checkpoint may have too many, as `model.drop_tensors`.

    Attributes:
        train_windows: (n, T) int64, this rank's, after setup("fit").
        held_out_windows: (m, T) int64, this rank's, after setup("fit").
        eval_names: names of the evaluation sets, in the order of val_dataloader's list.

    Raises:
        LitBinqError: an option out of range; from `setup`: text or tokenizer that cannot be used.
    """

    def __init__(
        self,
        tokenizer: str,
        train: TextSource | list[TextSource] | None = None,
        window_length: int = 1024,
        windows: int = 128,
        take: Take = "first",
        seed: int = 0,
        bos: bool = False,
        held_out: float = 0.1,
        batch_size: int = 4,
        evaluation: dict[str, TextSource] | None = None,
        eval_windows: int | None = 64,
        eval_length: int = 1024,
        eval_batch_size: int = 4,
        revision: str | None = None,
        self_generated: SelfGenerated = NOT_GENERATED,
        drop_tensors: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.drop_tensors = list(drop_tensors)
        self.tokenizer, self.revision, self.self_generated = tokenizer, revision, self_generated
        # Not as the argument's own default: the command line would mix its fields into what the user gives.
        train = WIKITEXT2 if train is None else train
        self.train = train if isinstance(train, list) else [train]
        self.window_length, self.windows, self.take, self.seed, self.bos = (
            window_length,
            windows,
            take,
            seed,
            bos,
        )
        self.held_out, self.batch_size = held_out, batch_size
        self.evaluation = {"wikitext2": WIKITEXT2_TEST} if evaluation is None else evaluation
        self.eval_windows, self.eval_length, self.eval_batch_size = eval_windows, eval_length, eval_batch_size
        self._check()
        self.eval_names = list(self.evaluation)
        self.train_windows = self.held_out_windows = torch.empty(0, window_length, dtype=torch.int64)
        self._calibration: tuple[Tensor, Tensor] | None = None  # train, held-out windows of all ranks
        self._evaluation: dict[str, Tensor] | None = None  # windows of all ranks
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._described = ""

    def _check(self) -> None:
        """Refuse contradictory options, naming them."""
        smallest = {"window_length": 2 + self.bos, "windows": len(self.train), "batch_size": 1}
        smallest |= {"eval_length": 2, "eval_batch_size": 1}
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise LitBinqError(f"{name}: got {getattr(self, name)}, expected at least {least}")
        if not self.train:
            raise LitBinqError("train: got no text source, expected at least one")
        if self.eval_windows is not None and self.eval_windows < 1:
            raise LitBinqError(f"eval_windows: got {self.eval_windows}, expected at least 1, or null for all")
        if not 0 <= self.held_out < 1:
            raise LitBinqError(f"held_out: got {self.held_out}, expected a share from 0 to below 1")
        if self.take not in ("first", "random"):
            raise LitBinqError(f"take: got {self.take!r}, expected 'first' or 'random'")

    def setup(self, stage: str | None = None) -> None:
        """Tokenize once what the stage needs: "fit" calibration, None both, all others evaluation.

        Raises:
            LitBinqError: text or tokenizer that cannot be used, or too few windows for the ranks.
        """
        rank, ranks = self._place()
        if stage in ("fit", None):
            if self._calibration is None:
                self._calibration = self._split(self._mix(self.load_tokenizer()))
            train, held_out = self._calibration
            self.train_windows = self._share(train, rank, ranks, "windows")
            self.held_out_windows = self._share(held_out, rank, ranks, "held_out")
        if stage in ("validate", "test", "predict", None):
            self.load_evaluation()
        if rank == 0 and self._described != (described := self.describe()):
            self._described = described
            log.info("%s", described)
            if self._calibration is not None and self._evaluation is not None:
                self._report_overlap(self.load_tokenizer())

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, read once.

        Raises:
            LitBinqError: see `lit_binq.models.load.load_tokenizer`.
        """
        self._tokenizer = self._tokenizer or load_tokenizer(self.tokenizer, revision=self.revision)
        return self._tokenizer

    def load_evaluation(self) -> None:
        """Read and tokenize the evaluation sets once: a fit asks for them before it begins.

        Raises:
            LitBinqError: an evaluation text that cannot be used; names the set.
        """
        if self._evaluation is not None:
            return
        made = {}
        for name in self.eval_names:
            try:
                made[name] = self._eval_set(self.load_tokenizer(), name)
            except LitBinqError as error:
                raise LitBinqError(f"data.evaluation, set {name!r}: {error}") from error
        self._evaluation = made

    @property
    def evaluation_windows(self) -> dict[str, Tensor]:
        """Windows (n, T) of each evaluation set, over all ranks; empty before they are loaded."""
        return self._evaluation or {}

    def _report_overlap(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Say how much of each evaluation set was calibrated on, be it real text or prompts of what a model wrote."""
        assert self._calibration is not None
        assert self._evaluation is not None
        calibration = tokenizer.batch_decode(torch.cat(self._calibration))
        for name, windows in self._evaluation.items():
            shared, every = shared_sequences(tokenizer.batch_decode(windows), calibration)
            log.info(
                "evaluation set %s: %d of its %d sequences of %d words occur in the calibration windows",
                *(name, shared, every, WORDS),
            )

    def _place(self) -> tuple[int, int]:
        """This process's rank and the number of ranks; 0 and 1 without a trainer."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _mix(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """(n, T): the windows of all sources, dealt in turn."""
        if self.bos and tokenizer.bos_token_id is None:
            raise LitBinqError(
                f"bos: the tokenizer of {self.tokenizer!r} has no BOS token; set the option `bos` to false"
            )
        parts = []
        written = round(self.self_generated.share * self.windows)
        for i, (source, count) in enumerate(zip(self.train, self._counts(self.windows - written), strict=True)):
            if not count:
                continue
            ids = encode(tokenizer, read_text(source))
            part = make_windows(ids, self.window_length - self.bos, count, take=self.take, seed=self.seed + i)
            if len(part) < count:
                log.warning(
                    "text %r has %d tokens: %d windows of %d instead of %d; lower windows or give more text",
                    *(source.path, len(ids), len(part), self.window_length, count),
                )
            parts.append(part)
        if written:
            parts.append(self._write(tokenizer, written))
        # Window k of n stands at (k + 1/2) / n: sources of any lengths come evenly, those of one length in turn.
        places = [((k + 0.5) / len(part), i, k) for i, part in enumerate(parts) for k in range(len(part))]
        mixed = torch.stack([parts[i][k] for _, i, k in sorted(places)])
        if self.bos:
            mixed = torch.nn.functional.pad(mixed, (1, 0), value=int(tokenizer.bos_token_id))
        return mixed

    def _write(self, tokenizer: PreTrainedTokenizerBase, count: int) -> Tensor:
        """(count, T) windows that the model writes itself."""
        rank, ranks = self._place()
        around: dict[str, Any] = {}
        if self.trainer is not None:
            around = {"device": self.trainer.strategy.root_device, "barrier": self.trainer.strategy.barrier}
        return write_windows(
            self.self_generated,
            self.tokenizer,
            tokenizer,
            self.train,
            count,
            self.window_length - self.bos,
            revision=self.revision,
            drop_tensors=self.drop_tensors,
            rank=rank,
            ranks=ranks,
            **around,
        )

    def _counts(self, windows: int) -> list[int]:
        """Windows of each source, `windows` in all: proportional to its share, the largest remainders rounded up.

        Where there are enough every source gets one, from those that have most; where the model writes nearly all
        windows itself some sources may get none.
        """
        total = sum(source.share for source in self.train)
        exact = [windows * source.share / total for source in self.train]
        counts = [int(x) for x in exact]
        order = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
        for i in order[: windows - sum(counts)]:
            counts[i] += 1
        while windows >= len(counts) and 0 in counts:
            counts[counts.index(max(counts))] -= 1
            counts[counts.index(0)] += 1
        return counts

    def _split(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Train and held-out windows; the held-out ones are the last."""
        held = max(1, round(self.held_out * len(windows))) if self.held_out else 0
        if held >= len(windows):
            raise LitBinqError(
                f"held_out: got {self.held_out} of {len(windows)} windows, which leaves none to calibrate "
                "on; raise windows or lower held_out"
            )
        return windows[: len(windows) - held], windows[len(windows) - held :]

    def _share(self, windows: Tensor, rank: int, ranks: int, option: str) -> Tensor:
        """This rank's part, equally long on every rank."""
        each = len(windows) // ranks
        if len(windows) and not each:
            raise LitBinqError(
                f"{option}: {len(windows)} windows for {ranks} ranks, expected at least one each; "
                f"raise {option} or use fewer devices"
            )
        if rank == 0 and len(windows) % ranks:
            log.warning(
                "%s: %d windows dropped so that %d ranks get equally many",
                option,
                len(windows) % ranks,
                ranks,
            )
        return windows[rank::ranks][:each]

    def _eval_set(self, tokenizer: PreTrainedTokenizerBase, name: str) -> Tensor:
        """(n, T): the windows of one evaluation set."""
        windows = make_windows(encode(tokenizer, read_text(self.evaluation[name])), self.eval_length, self.eval_windows)
        if self.eval_windows is not None and len(windows) < self.eval_windows:
            log.warning("evaluation %r: only %d windows instead of %d", name, len(windows), self.eval_windows)
        return windows

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Batches {"input_ids": (b, T) int64, "index": (b,) int64 rows of train_windows}, in order.

        The calibration draws the order of an epoch itself: it belongs to the stage, which a checkpoint resumes.
        """
        return _loader(self.train_windows, self.batch_size)

    def val_dataloader(self) -> list[DataLoader[dict[str, Any]]]:
        """One loader an evaluation set, batches {"input_ids": (b, T)}; none while fitting.

        Perplexity belongs to `validate` and `test`: while fitting, blocks are judged on the held-out windows.
        """
        if self.trainer is not None and self.trainer.state.fn == "fit":
            # No loader is what is meant here; Lightning asks whether it is.
            warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
            return []
        if self._evaluation is None:
            raise LitBinqError('evaluation sets are not set up; call setup("validate") first')
        rank, ranks = self._place()
        return [_loader(w[rank::ranks], self.eval_batch_size) for w in self._evaluation.values()]

    def test_dataloader(self) -> list[DataLoader[dict[str, Any]]]:
        """The same sets as val_dataloader."""
        return self.val_dataloader()

    def predict_dataloader(self) -> list[DataLoader[dict[str, Any]]]:
        """The same sets as val_dataloader."""
        return self.val_dataloader()

    def describe(self) -> str:
        """The rules and what came of them, in words: one line for calibration, one for evaluation."""
        lines = []
        if self._calibration is not None:
            train, held_out = self._calibration
            texts = " + ".join(source.words() for source in self.train)
            texts += f"; {self.self_generated.words()}" if self.self_generated.share else ""
            lines.append(
                f"calibration: {texts}; {self.take} windows of {self.window_length} tokens"
                f"{' after BOS' if self.bos else ', no BOS'}, seed {self.seed}: {len(train)} to calibrate on "
                f"({train.numel()} tokens), {len(held_out)} held out ({held_out.numel()} tokens); "
                f"fingerprint {self.fingerprint()}"
            )
        if self._evaluation is not None:
            sets = "; ".join(
                f"{name} = {self.evaluation[name].words()}, {len(windows)} windows"
                for name, windows in self._evaluation.items()
            )
            lines.append(
                f"evaluation: {sets or 'none'}; first windows of {self.eval_length} tokens, no BOS; "
                f"fingerprint {self.fingerprint('evaluation')}"
            )
        return "\n".join(lines)

    def fingerprint(self, part: Literal["calibration", "evaluation"] = "calibration") -> str:
        """16 hex digits of the sha256 over the rules and the token ids of all ranks.

        Raises:
            LitBinqError: that part is not set up.
        """
        if part == "calibration":
            rules: dict[str, Any] = {
                name: getattr(self, name) for name in ("window_length", "windows", "take", "seed", "bos", "held_out")
            }
            rules["train"] = [source.rules() for source in self.train]
            if self.self_generated.share:
                rules["self_generated"] = {"share": self.self_generated.share, **self.self_generated.rules()}
            tensors: tuple[Tensor, ...] | None = self._calibration
        else:
            rules = {name: getattr(self, name) for name in ("eval_windows", "eval_length")}
            rules["evaluation"] = {name: source.rules() for name, source in self.evaluation.items()}
            tensors = None if self._evaluation is None else tuple(self._evaluation.values())
        if tensors is None:
            raise LitBinqError(f"fingerprint: the {part} windows are not set up; call setup first")
        digest = hashlib.sha256(json.dumps(rules, sort_keys=True).encode())
        for windows in tensors:
            digest.update(f"{tuple(windows.shape)}".encode())
            digest.update(windows.contiguous().numpy().astype("<i8").tobytes())
        return digest.hexdigest()[:16]
