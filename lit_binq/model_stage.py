"""The model stage: tune the whole student on the teacher's next-token distribution.

May touch: blocks, streams, formats, losses. Knows nothing of Lightning.
"""

import torch
from torch import Tensor, nn

from lit_binq.blocks import find_layers, move, replace_module
from lit_binq.formats import LatentLinear, PackedLinear
from lit_binq.graphs import GraphedLoss
from lit_binq.losses import kl_divergence
from lit_binq.stages import Stage
from lit_binq.workspace import round_parameters


class ModelStage(Stage):
    """Tune the whole student on the teacher's next-token distribution: scales, norms and, with care, codes.

    Args:
        work: the workspace, every block packed.
        tuning: how the model is tuned.
    """

    title = "model"

    def enter(self) -> None:
        """Make the packed linears trainable again and move teacher and student to the device."""
        w = self.work
        w.streams.close()
        move(w.teacher, w.device)
        for block in w.blocks:
            block.to(w.device)
            for name, layer in find_layers(block, PackedLinear).items():
                # Latents left over from block tuning sit close to zero where a code was undecided, and would flip at
                # once by the thousand. From one common size only codes that are pushed steadily flip.
                replace_module(block, name, layer.latent(bool(self.tuning.lr_codes)))
        self.module = move(w.student, w.device)
        self._windows = w.streams.windows.to(w.device)
        self._loss = GraphedLoss(_ModelLoss(self.module, w.teacher), w.cuda_graphs)

    def loss(self, rows: Tensor) -> Tensor:
        """Mean KL(teacher || student) over the tokens of windows `rows` (b,)."""
        return self._loss(self._windows[rows.to(self._windows.device)])

    @torch.no_grad()
    def evaluate(self, *, held_out: bool) -> Tensor:
        """Summed KL over windows, and the number of windows."""
        s = self.work.streams
        first, last = (s.train, s.train + s.held_out) if held_out else (0, s.train)
        total = torch.zeros(2, dtype=torch.float64, device=self.work.device)
        step = min(s.options.batch_windows, 8)  # logits of a large vocabulary are what takes the memory
        for i in range(first, last, step):
            rows = torch.arange(i, min(i + step, last))
            total += torch.stack((self.loss(rows).double() * len(rows), torch.full_like(total[0], len(rows))))
        return total

    def loose_matrices(self) -> list[nn.Parameter]:
        """The student's embeddings, and its head where that is not the same tensor."""
        return list(self.work.loose_matrices().values())

    def leave(self) -> None:
        """Pack the student's linears again."""
        for block in self.work.blocks:
            for name, layer in find_layers(block, LatentLinear).items():
                replace_module(block, name, layer.pack())
        self.module.requires_grad_(False)
        round_parameters(self.module, self.work.rest_dtype)


class _ModelLoss(nn.Module):
    """Token windows (b, T) to the mean KL(teacher || student) over their tokens, a scalar."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher

    def forward(self, windows: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = self.teacher(input_ids=windows, use_cache=False).logits
        return kl_divergence(self.student(input_ids=windows, use_cache=False).logits, teacher)
