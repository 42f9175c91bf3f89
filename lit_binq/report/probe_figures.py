"""The figures of the single-layer probe: what a layer's own error says about its block's loss.

Legend: x~, W, W^ as in lit_binq.utils.json_records. Losses are of the whole block's output, as papers define them (kind
`block`). Every method is compared with the first one: weight alignment, if it is there.
"""

import math
from collections.abc import Sequence
from itertools import cycle
from statistics import median
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from lit_binq.report.plotting import COLOURS, Drawing, panels, plain_log, sentence, short_names
from lit_binq.report.runs import Run


class Point(NamedTuple):
    """One layer of one block, quantized alone by one method: its error, the block's loss, and that without it."""

    block: int
    layer: str
    method: str
    error: float
    loss: float
    floor: float


def points(run: Run) -> list[Point]:
    """Everything the probe measured; what is not finite is left out."""
    found = []
    for b in run.blocks:
        for layer, methods in (b.probe.linears if b.probe else {}).items():
            for method, m in methods.items():
                floor = b.probe.floor.block if b.probe else None
                if m.activation_error_relative is not None and m.loss.block is not None and floor is not None:
                    found.append(Point(b.block, layer, method, m.activation_error_relative, m.loss.block, floor))
    return found


def methods_of(found: list[Point]) -> list[str]:
    """The methods, weight alignment first."""
    return sorted(dict.fromkeys(p.method for p in found), key=lambda m: m != "weight")


def probe_bars(run: Run, runs: Sequence[Run], number: int) -> Drawing | None:
    """Error of each layer quantized alone, and what it adds to the block's loss; medians over blocks."""
    found = points(run)
    methods, layers = methods_of(found), list(dict.fromkeys(p.layer for p in found))
    if not found:
        return None
    figure, axes = panels(2, 2.7)
    width = 0.8 / len(methods)
    added: dict[tuple[str, str], float] = {}
    for k, (method, colour) in enumerate(zip(methods, cycle(COLOURS), strict=False)):
        at = np.arange(len(layers)) + (k - (len(methods) - 1) / 2) * width
        own = {n: [p for p in found if p.layer == n and p.method == method] for n in layers}
        added |= {(method, n): median(p.loss - p.floor for p in group) for n, group in own.items() if group}
        axes[0].bar(at, [median(p.error for p in own[n]) if own[n] else math.nan for n in layers], width, color=colour)
        axes[1].bar(at, [added.get((method, n), math.nan) for n in layers], width, color=colour)
    for ax in axes:
        ax.grid(visible=False, axis="x")
        ax.axhline(0, color="#111111", linewidth=0.8)
    axes[0].set_title("error of the layer alone", loc="left")
    axes[0].set_ylabel("|Wx~ - Ŵx~| / |Wx~|")
    axes[1].set_title("what it adds to the loss of its block", loc="left")
    axes[1].set_ylabel("relative squared error")
    axes[1].set_xticks(range(len(layers)), short_names(layers), rotation=30, ha="right")
    axes[1].set_xlabel("the one layer that is quantized (median over blocks)")
    handles = [Line2D([], [], color=c, linewidth=6, label=m) for m, c in zip(methods, cycle(COLOURS), strict=False)]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), 3), frameon=False)
    parts = []
    for method in methods:
        layer, value = max(((n, v) for (m, n), v in added.items() if m == method), key=lambda nv: nv[1])
        parts.append(f"by {method} it is {layer} that adds most to the loss of its block, {value:.3g} in the median")
    return Drawing(f"probe-bars-{number}", f"One layer quantized alone{_of(run, runs)}", figure, sentence(parts))


def probe_pairs(run: Run, runs: Sequence[Run], number: int) -> Drawing | None:
    """Every probed layer as a point: its error and its block's loss by each method, against the first one."""
    found = points(run)
    methods = methods_of(found)
    if len(methods) < 2:
        return None
    base = {(p.block, p.layer): p for p in found if p.method == methods[0] and p.error > 0}
    figure, (ax,) = panels(1, 4.3)
    parts = []
    for method, colour in zip(methods[1:], cycle(COLOURS[1:]), strict=False):
        own = [(p, base[p.block, p.layer]) for p in found if p.method == method and (p.block, p.layer) in base]
        if not own:
            continue
        errors, rises = [p.error / b.error for p, b in own], [p.loss - b.loss for p, b in own]
        ax.scatter(errors, rises, 22, color=colour, alpha=0.7, linewidths=0, label=method)
        better = [(p, b) for p, b in own if p.error < b.error]
        worse = sum(p.loss > b.loss for p, b in better)
        clearly = sum(p.loss > 1.01 * b.loss for p, b in better)
        verdict = f"yet a higher block loss in {worse} of these, by more than 1% in {clearly}" if worse else (
            "a higher block loss in none of these")  # fmt: skip
        parts.append(
            f"{method} has a lower activation-conditioned error than {methods[0]} in {len(better)} of {len(own)} "
            f"layers, and {verdict}"
        )
    if not parts:
        return None
    _mark_corner(ax)
    ax.set_xlabel(f"activation-conditioned error over that of {methods[0]} (1)")
    ax.set_ylabel(f"block loss minus that of {methods[0]} (1)")
    figure.legend(loc="outside upper left", ncols=3, frameon=False)
    title = f"Layer error against block loss{_of(run, runs)}"
    return Drawing(f"probe-{number}", title, figure, sentence([f"quantized alone, {parts[0]}", *parts[1:]]))


def _mark_corner(ax: Axes) -> None:
    """Logarithmic axes, lines where nothing differs, and the corner of a better layer in a worse block coloured."""
    ax.set_xscale("log")
    ax.set_yscale("symlog", linthresh=1e-3, linscale=0.6)
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    left, right, bottom, top = min(left, 0.8), max(right, 1.3), min(2 * bottom, -2e-3), max(8 * top, 2e-3)
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)
    plain_log(ax.xaxis)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.fill_between([left, 1], 0, top, color="#FFF1D6", zorder=0, linewidth=0)
    ax.axvline(1, color="#111111", linewidth=0.8)
    ax.axhline(0, color="#111111", linewidth=0.8)
    ax.annotate("better layer,\nworse block", (0.02, 0.98), xycoords="axes fraction", va="top", fontsize=9.5)


def _of(run: Run, runs: Sequence[Run]) -> str:
    return f" ({run.name})" if len(runs) > 1 else ""
