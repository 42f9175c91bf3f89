"""A finished run as its files tell it: the packed folder's facts and, if there, its diagnostics.

A run is a folder that holds `packed/` (or is a packed folder itself), with `diagnostics.json` beside or inside it.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_binq.errors import LitBinqError
from lit_binq.formats.manifest import MANIFEST, read_manifest
from lit_binq.utils.json_records import DIAGNOSTICS, BlockMeasures, parse_as, read_diagnostics


@dataclass
class StageLine:
    """What one stage reported; lit_binq.calibration.result says what each figure is."""

    title: str
    before: float | None
    after: float | None
    epochs: int
    best_epoch: int
    seconds: float


@dataclass
class Run:
    """One run.

    Attributes:
        name: short name that tells it from the others in a report.
        packed: its packed folder.
        true_bits: stored bits of the weights inside its blocks, for each of them (lit_binq.hub.bits).
        facts: whatever the fit kept.
        options: options of the fit, as far as it kept them.
        stages: its stages, in order.
        blocks: its diagnostics; empty if none were measured.
    """

    name: str
    packed: Path
    true_bits: float
    facts: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    stages: list[StageLine] = field(default_factory=list)
    blocks: list[BlockMeasures] = field(default_factory=list)

    def block_stages(self) -> list[StageLine]:
        """Stages that quantized a block."""
        return [s for s in self.stages if s.title.startswith("block")]

    def option(self, *path: str) -> Any:
        """An option by its path, None if the fit did not keep it."""
        value: Any = self.options
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def load_run(folder: str | Path) -> Run:
    """Read a run.

    Args:
        folder: folder that holds `packed/`, or a packed folder.

    Raises:
        LitBinqError: neither, or one of its files is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LitBinqError(f"run {str(folder)!r}: no such folder; expected a folder that `litbinq fit` wrote to")
    packed = folder if (folder / MANIFEST).is_file() else folder / "packed"
    if not (packed / MANIFEST).is_file():
        raise LitBinqError(
            f"run {str(folder)!r}: holds neither {MANIFEST} nor packed/{MANIFEST}; expected the packed "
            "folder of `litbinq fit` or the folder around it"
        )
    manifest = read_manifest(packed)
    # A folder around others may hold another run's diagnostics, one around `packed` does not.
    places = [packed, packed.resolve().parent] if packed.resolve().name == "packed" else [packed]
    found = next((p / DIAGNOSTICS for p in reversed(places) if (p / DIAGNOSTICS).is_file()), None)
    around = packed.resolve().parent if packed.resolve().name == "packed" else packed.resolve()
    facts = manifest.get("facts")
    facts = facts if isinstance(facts, dict) else {}
    where = f"run {str(folder)!r}: {MANIFEST}"
    try:
        bits = parse_as(float, manifest["true_bits"], "true_bits")
        told = facts.get("stages", [])
        if not isinstance(told, list):
            raise ValueError(f"facts.stages: got {str(told)[:40]!r}, expected a list")
        stages = [_stage(s, f"facts.stages[{i}]") for i, s in enumerate(told)]
    except ValueError as error:
        raise LitBinqError(f"{where}: {error}; run the fit again") from None
    return Run(around.name, packed, bits, facts, _options(facts), stages, read_diagnostics(found) if found else [])


def _stage(value: Any, where: str) -> StageLine:
    kept = {k: v for k, v in value.items() if k in StageLine.__annotations__} if isinstance(value, dict) else value
    for key in ("before", "after"):
        if isinstance(kept, dict) and kept.get(key) in (float("inf"), float("-inf")):
            kept[key] = None
    line: StageLine = parse_as(StageLine, kept, where)
    return line


def _options(facts: dict[str, Any]) -> dict[str, Any]:
    """The options inside a run's identity, where they are a JSON text."""
    identity = facts.get("identity")
    try:
        options = json.loads(identity["options"]) if isinstance(identity, dict) else {}
    except (KeyError, TypeError, ValueError):
        options = {}
    return options if isinstance(options, dict) else {}


def load_runs(folders: list[str]) -> list[Run]:
    """Read several runs and give those with the same name longer ones.

    Raises:
        LitBinqError: one of them cannot be read, or is named twice.
    """
    runs = [load_run(f) for f in folders]
    places = [r.packed.resolve() for r in runs]
    if len(set(places)) < len(places):
        twice = next(p for p, n in Counter(places).items() if n > 1)
        raise LitBinqError(f"baselines: the run {str(twice)!r} is named twice, expected different ones")
    counts = Counter(r.name for r in runs)
    for run, folder in zip(runs, folders, strict=True):
        if counts[run.name] > 1:
            run.name = folder.rstrip("/")
    return runs
