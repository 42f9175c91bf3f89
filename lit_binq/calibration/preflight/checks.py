"""What a fit, the evaluation after it and the export will ask, asked before the first block: seconds for hours.

Everything that can be known is tried on the loaded model: evaluation texts are read and cut into windows, the tokenizer
is written and read again, blocks run by themselves and with linear layers that hide their weights, the export is asked,
and memory, disk and time are estimated (lit_binq.calibration.preflight.estimates,
lit_binq.calibration.preflight.durations) and compared with what there is.

Refused in one line is what the fit or its evaluation cannot do, what the export cannot do unless the option
`preflight.torch_only` says that torch is enough, and a need that clearly exceeds what there is.
"""

import logging
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lit_binq.calibration.preflight.durations import fit_seconds
from lit_binq.calibration.preflight.estimates import Estimate, Phase, Run, estimate, gigabytes, minutes
from lit_binq.errors import LitBinqError, first_line
from lit_binq.models.block_calls import BlockCall, capture_calls, hooked
from lit_binq.models.blocks import find_blocks, replace_module, require_fitting
from lit_binq.models.supported import unsupported_reason
from lit_binq.utils.memory import host_available, host_peak, resident
from lit_binq.utils.places import free_bytes

log = logging.getLogger(__name__)

CLEARLY = 1.25
"""An estimate that exceeds what there is by this factor is refused, as far as estimates are off; less is a warning."""

FEW = 4
"""Tokens of a pass that only looks at which modules do what."""

CHECKPOINTS = 2
"""The one before is still there while the next one is written."""


@dataclass
class PreflightOptions:
    """What is asked before a fit begins.

    Attributes:
        torch_only: the packed model is for torch: go on where `litbinq export` cannot follow.
        check_resources: refuse a fit that clearly needs more memory or disk than there is; false only warns.
    """

    torch_only: bool = False
    check_resources: bool = True


@dataclass
class Asked:
    """What a preflight looks at.

    Attributes:
        model: the full-precision model, loaded.
        tokenizer: its tokenizer.
        window: (1, T) int64, a calibration window.
        run: sizes and options of the fit.
        evaluation: windows (n, T) of each evaluation set; None if nothing is evaluated afterwards.
        packed: where the packed folder goes.
        checkpoint: where checkpoints go, None without.
        cache: where streams of `streams.cache: disk` go.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    window: Tensor
    run: Run
    evaluation: Mapping[str, Tensor] | None
    packed: Path
    checkpoint: Path | None = None
    cache: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))


@dataclass
class Report:
    """What a preflight found.

    Attributes:
        estimate: memory by phase, and what is written.
        host: bytes the host has for this process, those it holds among them; None if the system does not say.
        device: bytes free on the CUDA device; 0 on a CPU.
        disk: what is written and what is free, by place.
        seconds: estimated time of the fit.
        took: seconds of the preflight.
        reached: bytes of host memory the process had at most before the fit.
        calls: the blocks' arguments, on the host.
    """

    estimate: Estimate
    host: int | None
    device: int
    disk: list[tuple[str, float, int]]
    seconds: float
    took: float
    reached: int = 0
    calls: list[BlockCall] = field(default_factory=list)

    def facts(self) -> dict[str, int | None]:
        """The fit's estimated peak in bytes, for the packed folder; the same keys as the measured one."""
        e = self.estimate
        host = max(e.fit_peak(e.host), self.reached)
        return {"host_bytes": host, "device_bytes": e.fit_peak(e.device) if e.device else None}

    def line(self) -> str:
        """Everything in one line."""
        e = self.estimate
        host = e.largest(e.host)
        parts = [f"about {minutes(self.seconds)}"]
        if e.device:
            device = e.largest(e.device)
            parts.append(f"device memory {gigabytes(device.total)} of {gigabytes(self.device)} GB ({device.name})")
        have = f" of {gigabytes(self.host)}" if self.host is not None else ""
        parts.append(f"host memory {gigabytes(max(host.total, self.reached))}{have} GB ({host.name})")
        parts.append(f"disk {gigabytes(sum(size for _, size, _ in self.disk))} GB")
        return f"preflight: fit, evaluation and export asked in {self.took:.1f} s; estimated {', '.join(parts)}"

    def table(self) -> str:
        """Every phase by its parts, in GB."""
        e = self.estimate
        rows = [("preflight", f"{self.took:.1f} s", ""), ("time", f"about {minutes(self.seconds)}", "")]
        for where, phases, have in (("device", e.device, self.device), ("host", e.host, self.host)):
            rows += [(f"{where}, {p.name}", f"{gigabytes(p.total)} GB", _parts(p)) for p in phases]
            if phases and have is not None:
                rows.append((f"{where}, there is", f"{gigabytes(have)} GB", ""))
        rows += [
            (f"disk, {name}", f"{gigabytes(size)} GB", f"free {gigabytes(free)}") for name, size, free in self.disk
        ]
        widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
        return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c}".rstrip() for a, b, c in rows)


def _parts(phase: Phase) -> str:
    largest = sorted(phase.parts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {gigabytes(size)}" for name, size in largest if size >= 5e6)


def preflight(asked: Asked, options: PreflightOptions) -> Report:
    """Ask everything; what memory and disk there is remains to be compared with, by `require_resources`.

    Args:
        asked: the model and what will be done with it.
        options: what is refused.

    Raises:
        LitBinqError: the first thing that cannot work, in one line that names the option.
    """
    began = time.monotonic()
    loading = max((host_peak() or 0) - resident(), 0)
    model, run = asked.model, asked.run
    for name, windows in (asked.evaluation or {}).items():
        require_fitting(model, windows, f"data.eval_length (evaluation set {name!r})")
    require_export(model, torch_only=options.torch_only)
    blocks = find_blocks(model)
    versions = {name: t._version for name, t in model.named_parameters()}
    calls = capture_calls(model, blocks, asked.window)
    require_same_weights(model, versions)
    run.cached = require_hidden_weights(model, blocks, asked.window[:, :FEW])
    tokenizer_bytes = require_tokenizer(asked.tokenizer, model)
    seconds = fit_seconds(model, run)
    # Resident is read last: what the libraries load for the first passes stays.
    made = estimate(model, calls, run, resident, loading)
    available = host_available()
    report = Report(
        estimate=made,
        host=None if available is None else available + resident(),
        device=run.free,
        disk=_disk(asked, made, tokenizer_bytes),
        seconds=seconds,
        took=0.0,
        reached=host_peak() or 0,
        calls=calls,
    )
    report.took = time.monotonic() - began
    return report


def require_export(model: PreTrainedModel, *, torch_only: bool) -> None:
    """Refuse a model that `litbinq export` cannot carry, or say so where torch is enough.

    Raises:
        LitBinqError: it cannot, and `torch_only` is off.
    """
    reason = unsupported_reason(model)
    if reason is None:
        return
    if not torch_only:
        raise LitBinqError(
            f"model: {reason}; if that is enough set `model.preflight.torch_only: true`, otherwise change the option "
            "`model.model`"
        )
    log.warning("`litbinq export` will refuse this model: %s", reason)


class _Watched(nn.Module):
    """A linear layer that notes whether it is called and whether its weight is read from outside."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        object.__setattr__(self, "linear", linear)
        object.__setattr__(self, "called", False)
        object.__setattr__(self, "read", False)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            object.__setattr__(self, "read", True)
        return getattr(self.linear, name)

    def forward(self, x: Tensor) -> Tensor:
        object.__setattr__(self, "called", True)
        return self.linear(x)


@torch.no_grad()
def require_hidden_weights(model: PreTrainedModel, blocks: nn.ModuleList, windows: Tensor) -> bool:
    """Refuse models whose code reads the weight of a linear layer that it also calls: a packed one has none.

    Args:
        model: full precision.
        blocks: its decoder blocks.
        windows: (b, T) int64, short.

    Returns:
        Whether the model's logits are what its head gives, and nothing else.

    Raises:
        LitBinqError: it does, or a pass fails.
    """
    watched = {name: _Watched(m) for name, m in blocks.named_modules() if isinstance(m, nn.Linear)}
    head = model.get_output_embeddings()
    caught: list[Tensor] = []
    try:
        for name, layer in watched.items():
            replace_module(blocks, name, layer)
        with ExitStack() as stack:
            if isinstance(head, nn.Module):
                stack.enter_context(hooked(head.register_forward_pre_hook(lambda _, args: caught.append(args[0]))))
            logits = model(input_ids=windows, use_cache=False).logits
    except Exception as error:  # whatever a model's own code makes of a layer of another class
        raise LitBinqError(
            f"{type(model).__name__} fails with linear layers of another class ({first_line(error)}), expected layers "
            "that are only called: this architecture is not supported, change the option `model`"
        ) from error
    finally:
        for name, layer in watched.items():
            replace_module(blocks, name, layer.linear)
    # Those that are never called are never packed.
    if both := [name for name, layer in watched.items() if layer.called and layer.read]:
        raise LitBinqError(
            f"{type(model).__name__} reads the weight of {both[0]} itself, expected layers that are only called: "
            "this architecture is not supported, change the option `model`"
        )
    return isinstance(head, nn.Module) and len(caught) == 1 and torch.equal(head(caught[0]).float(), logits.float())


def require_same_weights(model: PreTrainedModel, versions: dict[str, int]) -> None:
    """Refuse models that change their weights while they run: a packed one has none to change.

    Args:
        model: after its first pass.
        versions: torch's count of changes of each parameter, before it.

    Raises:
        LitBinqError: a parameter was changed.
    """
    for name, t in model.named_parameters():
        if t._version != versions.get(name, t._version):
            raise LitBinqError(
                f"{type(model).__name__} changes {name} while it runs, expected weights that stay: this architecture "
                "is not supported, change the option `model`"
            )


def require_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """Write the tokenizer as the packed folder will, and read it again.

    Returns:
        Bytes of its files.

    Raises:
        LitBinqError: it cannot be written or read, or gives other tokens afterwards.
    """
    text = "The quick brown fox, 1984.\n"
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
            model.config.save_pretrained(folder)
            again = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            same = (
                again(text, add_special_tokens=False).input_ids == tokenizer(text, add_special_tokens=False).input_ids
            )
        except Exception as error:  # the tokenizers library raises bare Exception
            raise LitBinqError(
                f"tokenizer: its files cannot be written and read again ({first_line(error)}), which the packed folder "
                "needs: give a source with the tokenizer's own files in `model.model`"
            ) from error
        if not same:
            raise LitBinqError(
                "tokenizer: written and read again it gives other tokens, expected the same: give a source with the "
                "tokenizer's own files in `model.model`"
            )
        return sum(f.stat().st_size for f in Path(folder).iterdir())


def _disk(asked: Asked, made: Estimate, tokenizer: int) -> list[tuple[str, float, int]]:
    """What is written where, and what is free there; the packed folder's older one stays until the new one is whole."""
    places: list[tuple[str, Path | None, float]] = [
        ("model.packed", asked.packed, float(made.packed + tokenizer)),
        ("checkpoint.dirpath", asked.checkpoint, float(CHECKPOINTS * made.checkpoint)),
        ("model.streams.cache_dir", asked.cache if made.streams else None, float(made.streams)),
    ]
    return [(name, size, free_bytes(path)) for name, path, size in places if path is not None]


def require_resources(report: Report, run: Run, *, refuse: bool) -> None:
    """Compare the estimate with what there is.

    Args:
        report: estimate and what there is.
        run: options, for advice.
        refuse: whether to refuse what clearly exceeds it.

    Raises:
        LitBinqError: something is needed of which there is clearly too little.
    """
    e = report.estimate
    needs: list[tuple[str, float, float, str]] = []
    if e.device:
        phase = e.largest(e.device)
        needs.append((f"device memory ({phase.name})", phase.total, report.device, _advice(phase, run)))
    if report.host is not None:
        phase = e.largest(e.host)
        needs.append((f"host memory ({phase.name})", phase.total, report.host, _advice(phase, run)))
    needs += [(f"disk at {name}", size, free, f"choose another place for `{name}`") for name, size, free in report.disk]
    for what, size, have, advice in needs:
        if size <= have:
            continue
        short = f"{what}: about {gigabytes(size)} GB needed, {gigabytes(have)} GB there: {advice}"
        if refuse and size > CLEARLY * have:
            raise LitBinqError(f"preflight: {short}; or try it with `model.preflight.check_resources: false`")
        log.warning("preflight: %s", short)


def _advice(phase: Phase, run: Run) -> str:
    """The options that lower what takes most in a phase."""
    largest = max(phase.parts, key=lambda name: phase.parts[name])
    if "streams" in largest:
        return "lower `data.windows`, or set `model.streams.cache: " + (
            "host`" if run.device.type == "cuda" else "disk`"
        )
    if phase.name == "model":
        return "lower `data.batch_size`, or leave the model stage out with `model.end_to_end.epochs: 0`"
    if phase.name == "evaluation":
        return "lower `data.eval_batch_size`, or set `model.compare_fp: false`"
    if "statistics" in largest or "scores" in largest:
        return "lower `model.streams.batch_windows`"
    if "step" in largest:
        return "lower `data.batch_size`"
    return "a smaller model, or a machine with more"
