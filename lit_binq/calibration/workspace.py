"""What all stages of one rank share: the teacher, the student that takes its place block by block, the streams."""

import copy
import logging

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_binq.calibration.streams import StreamOptions, Streams
from lit_binq.formats.unquantized import require_holds, round_unquantized
from lit_binq.hub.bits import left_matrices
from lit_binq.models.block_calls import SHORT
from lit_binq.models.blocks import BlockCall, capture_calls, find_blocks, norm_parameters, require_fitting
from lit_binq.models.kv_cache import require_kv, set_kv_bits

log = logging.getLogger(__name__)


class Workspace:
    """What all stages of one rank share: teacher, student, streams.

    The student begins as a copy of the teacher that shares the tensors of its blocks; stage by stage its blocks are
    replaced. Everything outside the blocks is rounded at once to the dtype it will be stored in.

    Args:
        teacher: full-precision model in eval mode, float32.
        windows: (n, T) int64 token windows of this rank, held-out ones last.
        held_out: number of held-out windows at the end.
        device: where blocks run.
        options: activation cache.
        unquantized_dtype: dtype in which everything but the packed weights is stored.
        cuda_graphs: whether tuning steps may be captured as CUDA graphs.
        kv_bits: of the student's keys and values, see `lit_binq.models.kv_cache`; the teacher's are never quantized.
        calls: the blocks' arguments where they are known already.

    Raises:
        LitBinqError: windows too long for the model, or a model whose blocks cannot be run or quantized one by one.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        windows: Tensor,
        held_out: int,
        device: torch.device,
        options: StreamOptions,
        unquantized_dtype: torch.dtype,
        cuda_graphs: bool = False,
        kv_bits: int = 0,
        calls: list[BlockCall] | None = None,
    ) -> None:
        teacher.requires_grad_(False)
        self.teacher, self.device, self.unquantized_dtype = teacher, device, unquantized_dtype
        self.cuda_graphs, self.kv_bits = cuda_graphs, kv_bits
        self.rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self.bits: dict[str, float] = {}  # "block.linear": true bits it may take, where a budget was planned
        self.teacher_blocks = find_blocks(teacher)
        shared = {id(t): t for t in (*self.teacher_blocks.parameters(), *self.teacher_blocks.buffers())}
        self.student: PreTrainedModel = copy.deepcopy(teacher, shared)
        self.blocks = find_blocks(self.student)
        require_storable(teacher, self.teacher_blocks, unquantized_dtype)
        round_unquantized(self.student, unquantized_dtype, shared)
        self._report_left()
        self.streams = Streams(windows, held_out, device, options)
        self.home = next(teacher.parameters()).device  # where blocks rest that are not in progress
        require_fitting(teacher, windows, "data.window_length")
        window = windows[:1].to(self.home)
        self.calls = [call.to(device) for call in calls or capture_calls(teacher, self.teacher_blocks, window)]
        if kv_bits:
            # Its configuration is a copy, as every block's will be: the teacher's stays as it is.
            set_kv_bits(self.student, kv_bits)
            require_kv(self.student, self.blocks, window[:, :SHORT])
        self.streams.start((teacher, self.teacher_blocks), (self.student, self.blocks))

    def _report_left(self) -> None:
        """Say which matrices inside the blocks nothing will pack: true bits count them as they are stored."""
        packed = linear_weights(self.teacher_blocks)
        left = {name: p for name, p in left_matrices(self.teacher_blocks).items() if id(p) not in packed}
        if left and self.rank == 0:
            weights = sum(p.numel() for p in self.teacher_blocks.parameters() if p.dim() > 1)
            log.warning(
                "%d matrices inside the blocks, %.1f%% of their weights, are no linear layers and stay at full "
                "precision; true bits count them (first: block %s)",
                *(len(left), 100 * sum(p.numel() for p in left.values()) / weights, next(iter(left))),
            )

    def new_block(self, i: int) -> nn.Module:
        """A private copy of the teacher's block i on the device, with the student's keys and values."""
        block = copy.deepcopy(self.teacher_blocks[i]).to(self.device)
        set_kv_bits(block, self.kv_bits)
        return block

    def skip(self, i: int) -> None:
        """Advance both streams past the already packed block i."""
        self.streams.compute_targets(self.teacher_blocks[i].to(self.device), self.calls[i])
        self.place(i, self.blocks[i].to(self.device))

    def place(self, i: int, block: nn.Module) -> None:
        """Put the packed block i into the student, advance both streams, and clear the device of it."""
        self.streams.advance(block, self.calls[i])
        self.blocks[i] = block.to(self.home)
        self.teacher_blocks[i].to(self.home)

    def non_block_norms(self) -> dict[str, nn.Parameter]:
        """The student's norm parameters outside the blocks: only the model stage tunes them."""
        inside = {id(p) for p in self.blocks.parameters()}
        return {name: p for name, p in norm_parameters(self.student).items() if id(p) not in inside}

    def non_block_matrices(self) -> dict[str, nn.Parameter]:
        """The student's embeddings and head, a shared tensor once; only the model stage tunes them, if asked to."""
        inside = {id(p) for p in self.blocks.parameters()}
        return {name: p for name, p in self.student.named_parameters() if p.dim() == 2 and id(p) not in inside}


def linear_weights(blocks: nn.ModuleList) -> set[int]:
    """Ids of what will be packed."""
    return {id(m.weight) for m in blocks.modules() if isinstance(m, nn.Linear)}


def require_storable(teacher: PreTrainedModel, blocks: nn.ModuleList, unquantized_dtype: torch.dtype) -> None:
    """Make sure that all that will not be packed can be stored, inside the blocks as well; tuned norms are asked again.

    Raises:
        LitBinqError: see `lit_binq.formats.unquantized.require_holds`.
    """
    require_holds(teacher, unquantized_dtype, linear_weights(blocks))
