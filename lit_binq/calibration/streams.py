"""The two activation streams of the current block: full precision (x) and quantized (x~).

Legend: n windows of this rank, T tokens a window, d hidden size; x, x~ (n, T, d) inputs of the current block in
either stream, y (n, T, d) its full-precision output. The last `held_out` windows are never fitted on.

Streams advance block by block: after a block is packed, x becomes y and x~ the packed block's output.
Where they are kept is the option `cache`: on the device, in host memory, or in a memory-mapped file.
"""

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_binq.errors import LitBinqError
from lit_binq.models.blocks import BlockCall, embed, run_block

Cache = Literal["auto", "device", "host", "disk"]


@dataclass
class StreamOptions:
    """Where and how activations are cached.

    Attributes:
        cache: `device`, `host`, `disk`, or `auto`: the device if three streams take less than a third of its
            free memory, the host otherwise.
        cache_dir: folder of the memory-mapped files of `disk`; the system's temporary folder if empty.
        batch_windows: windows a forward pass takes while statistics are gathered and streams advance.

    Raises:
        LitBinqError: a value outside its range, or no such folder.
    """

    cache: Cache = "auto"
    cache_dir: str = ""
    batch_windows: int = 8

    def __post_init__(self) -> None:
        if self.cache not in get_args(Cache):
            raise LitBinqError(f"streams.cache: got {self.cache!r}, expected one of {', '.join(get_args(Cache))}")
        if self.batch_windows < 1:
            raise LitBinqError(f"streams.batch_windows: got {self.batch_windows}, expected at least 1")
        if self.cache == "disk" and self.cache_dir and not Path(self.cache_dir).is_dir():
            raise LitBinqError(f"streams.cache_dir: got {self.cache_dir!r}, expected an existing folder")


class Streams:
    """Cached inputs and outputs of the current block.

    Args:
        windows: (n, T) int64 token windows of this rank, the held-out ones last.
        held_out: how many windows at the end are held out.
        device: where blocks run.
        options: see `StreamOptions`.
    """

    def __init__(self, windows: Tensor, held_out: int, device: torch.device, options: StreamOptions) -> None:
        self.windows, self.held_out, self.device, self.options = windows, held_out, device, options
        self.train = len(windows) - held_out
        self.x: Tensor
        self.x_tilde: Tensor
        self.y: Tensor

    def start(
        self, teacher: tuple[PreTrainedModel, nn.ModuleList], student: tuple[PreTrainedModel, nn.ModuleList]
    ) -> None:
        """Fill the streams with the teacher's and the student's embeddings of the windows.

        Args:
            teacher: the full-precision model and its blocks.
            student: the same of the model being quantized.
        """
        device = next(teacher[0].parameters()).device
        first = embed(*teacher, self.windows[:1].to(device))
        shape = (len(self.windows), *first.shape[1:])
        self._place = self._choose(math.prod(shape) * 4)
        self.x, self.y, self.x_tilde = (self._allocate(shape, name) for name in ("x", "y", "x_tilde"))
        for rows in self.batches():
            windows = self.windows[rows].to(device)
            self.x[rows] = embed(*teacher, windows).float().to(self.x.device)
            self.x_tilde[rows] = embed(*student, windows).float().to(self.x.device)

    def _choose(self, size: int) -> str:
        if self.options.cache != "auto":
            return self.options.cache
        if self.device.type != "cuda":
            return "host"
        return "device" if 3 * size < torch.cuda.mem_get_info(self.device)[0] / 3 else "host"

    def _allocate(self, shape: tuple[int, ...], name: str) -> Tensor:
        if self._place == "device":
            return torch.empty(shape, device=self.device, dtype=torch.float32)
        if self._place == "host":
            return torch.empty(shape, dtype=torch.float32)
        size = math.prod(shape)
        try:
            with tempfile.NamedTemporaryFile(prefix="litbinq-streams-", dir=self.options.cache_dir or None) as file:
                # Its blocks are there before it is mapped: where one is missing, writing ends in a signal.
                os.posix_fallocate(file.fileno(), 0, 4 * size)
                mapped = torch.from_file(file.name, shared=True, size=size, dtype=torch.float32)
        except OSError as error:
            place = self.options.cache_dir or tempfile.gettempdir()
            raise LitBinqError(
                f"streams.cache_dir: {place!r} cannot take {4 * size / 1e9:.2f} GB for stream {name} "
                f"({error.strerror}), expected room for three: choose another folder, or fewer `data.windows`"
            ) from error
        return mapped.reshape(shape)  # the file has no name any more: however the process ends, its room is free

    def batches(self, stop: int | None = None, start: int = 0) -> Iterator[slice]:
        """Slices of consecutive windows, `batch_windows` long, from `start` up to `stop` (default: all)."""
        stop = len(self.windows) if stop is None else stop
        for i in range(start, stop, self.options.batch_windows):
            yield slice(i, min(i + self.options.batch_windows, stop))

    @torch.no_grad()
    def compute_targets(self, block: nn.Module, call: BlockCall) -> None:
        """y = the full-precision block's output on x, for every window."""
        for rows in self.batches():
            self.y[rows] = run_block(block, self.x[rows].to(self.device), call).to(self.y.device)

    @torch.no_grad()
    def advance(self, block: nn.Module, call: BlockCall) -> None:
        """Move on behind the current block: x becomes y, x~ the output of `block` (packed) on x~.

        Raises:
            LitBinqError: the new activations are not finite.
        """
        for rows in self.batches():
            out = run_block(block, self.x_tilde[rows].to(self.device), call)
            if not torch.isfinite(out).all():
                raise LitBinqError(
                    "a quantized block put out NaN or inf; expected finite activations: "
                    "raise the option `shrinkage` or lower the learning rates"
                )
            self.x_tilde[rows] = out.to(self.x_tilde.device)
        self.x, self.y = self.y, self.x

    @torch.no_grad()
    def block_error(
        self,
        block: nn.Module,
        call: BlockCall,
        rows: slice,
        errors: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Error of `block` on x~ over windows `rows`.

        Args:
            block: the block.
            call: its other arguments.
            rows: consecutive windows.
            errors: (y^, y) to two scalars that may be summed over batches, like `BlockCriterion.sums`.

        Returns:
            (2,) float64, the two sums.
        """
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for part in self.batches(rows.stop, rows.start):
            y = self.y[part].to(self.device)
            y_hat = run_block(block, self.x_tilde[part].to(self.device), call)
            sums += torch.stack(errors(y_hat, y)).double()
        return sums

    def close(self) -> None:
        """Free the cache."""
        for name in ("x", "y", "x_tilde"):
            if hasattr(self, name):
                delattr(self, name)
