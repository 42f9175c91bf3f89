"""The model stage: tune the whole student on the teacher's next-token distribution.

Knows nothing of Lightning.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lit_binq.calibration.as_stored import score_as_stored
from lit_binq.calibration.cuda_graphs import GraphedLoss
from lit_binq.calibration.distributed import take_module_from_first
from lit_binq.calibration.kl import kl_divergence
from lit_binq.calibration.options import ModelTuning
from lit_binq.calibration.stage import Stage, mean_size
from lit_binq.calibration.teacher_cache import TeacherCache, autocast_dtype, cache_teacher
from lit_binq.calibration.workspace import Workspace
from lit_binq.formats import LatentLinear, PackedLinear
from lit_binq.formats.unquantized import round_unquantized
from lit_binq.models.blocks import find_layers, move, replace_module


class ModelStage(Stage):
    """Tune the whole student on the teacher's next-token distribution: scales, norms and, with care, codes.

    Args:
        work: the workspace, every block packed.
        tuning: how the model is tuned.
    """

    title = "model"

    def __init__(self, work: Workspace, tuning: ModelTuning) -> None:
        super().__init__(work, tuning)
        self.tuning: ModelTuning = tuning

    def enter(self) -> None:
        """Make the packed linears trainable again and move the student to the device."""
        w = self.work
        w.streams.close()
        for block in w.blocks:
            block.to(w.device)
            for name, layer in find_layers(block, PackedLinear).items():
                # Latents left over from block tuning sit close to zero where a code was undecided, and would flip at
                # once by the thousand. From one common size only codes that are pushed steadily flip.
                replace_module(block, name, layer.latent(bool(self.tuning.lr_codes)))
        self.module = move(w.student, w.device)
        self._windows = w.streams.windows.to(w.device)
        self._cache: TeacherCache | None = None
        self._loss: GraphedLoss | None = None  # what the teacher says depends on the autocast that steps run under

    def loss(self, rows: Tensor) -> Tensor:
        """Mean KL(teacher || student) over the tokens of windows `rows` (b,)."""
        return self._of(self._prepared(), rows)

    def _of(self, loss: Callable[..., Tensor], rows: Tensor) -> Tensor:
        windows = self._windows[rows.to(self._windows.device)]
        if self._cache is None:
            return loss(windows)
        hidden = self._cache.hidden(rows)
        return loss(windows, hidden if self._autocast == autocast_dtype(self.work.device) else hidden.float())

    def _prepared(self) -> GraphedLoss:
        if self._loss is None or self._autocast != autocast_dtype(self.work.device):
            self._loss = self._prepare()
        return self._loss

    def _prepare(self) -> GraphedLoss:
        w = self.work
        self._autocast = autocast_dtype(w.device)
        self._cache = None  # of another autocast: its room first
        move(w.teacher, w.device)
        self._cache = cache_teacher(w.teacher, self._windows, self._batch)
        teacher: nn.Module = w.teacher
        if self._cache is not None:
            move(w.teacher, w.home)  # its room on the device is free again, but for the head's
            teacher = self._cache.head.to(w.device)
        return GraphedLoss(_ModelLoss(self.module, teacher), w.cuda_graphs)

    @property
    def _batch(self) -> int:
        return min(self.work.streams.options.batch_windows, 8)  # logits of a large vocabulary take the memory

    def evaluate(self, *, held_out: bool) -> Tensor:
        """Summed KL over windows, and the number of windows, of the student as it will be stored."""
        s = self.work.streams
        first, last = (s.train, s.train + s.held_out) if held_out else (0, s.train)
        # Kept hidden states of the teacher are those of the steps, under their autocast: the rounding of a target is
        # the same in every epoch, that of the student is what would mix up two of them.
        loss = self._prepared().module
        step = self._batch

        def sums() -> Tensor:
            total = torch.zeros(2, dtype=torch.float64, device=self.work.device)
            for i in range(first, last, step):
                rows = torch.arange(i, min(i + step, last))
                total += torch.stack((self._of(loss, rows).double() * len(rows), torch.full_like(total[0], len(rows))))
            return total

        return score_as_stored(self.module, self.work.unquantized_dtype, self.work.device, sums)

    def rates(self) -> Iterator[tuple[nn.Parameter, float]]:
        """As of every stage, and the student's embeddings, with its head where that is not the same tensor."""
        yield from super().rates()
        for p in self.work.non_block_matrices().values():
            yield p, self.tuning.lr_embeddings * mean_size(p)

    def leave(self) -> None:
        """Pack the student's linears again."""
        if self._loss is not None:
            self._loss.release()
        for block in self.work.blocks:
            for name, layer in find_layers(block, LatentLinear).items():
                replace_module(block, name, layer.pack())
        self.module.requires_grad_(False)
        round_unquantized(self.module, self.work.unquantized_dtype)
        take_module_from_first(self.module)


class _ModelLoss(nn.Module):
    """Token windows (b, T) to the mean KL(teacher || student) over their tokens, a scalar.

    The teacher is the whole model, or its head if `hidden` (b, T, d), what its head gets, is given.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher

    def forward(self, windows: Tensor, hidden: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            logits = self.teacher(input_ids=windows, use_cache=False).logits if hidden is None else self.teacher(hidden)
        return kl_divergence(self.student(input_ids=windows, use_cache=False).logits, logits)
