"""What the figures of a report share: numbers about curves, panels, colours, legends.

A curve has a figure for each block; depth is the number of the block. A trend is called one if its rank correlation
(Spearman) with depth is at least 0.5 in size.
"""

import io
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from lit_binq.report.runs import Run
from lit_binq.utils.json_records import BlockMeasures

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#7A5195", "#555555")
"""Told apart by colour-blind eyes and on white (after Okabe and Ito); as many as there may be runs."""

STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "legend.fontsize": 9.5,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": "#111111",
    "axes.labelcolor": "#111111",
    "lines.linewidth": 1.8,
    "text.parse_math": False,
}
WIDTH = 6.0  # inches; shown on a phone at 6 cm or more

LineStyle = Literal["-", "--", ":"]

Curve = dict[int, float]
"""Block -> value; blocks without one are left out."""


@dataclass
class Drawing:
    """A figure.

    Attributes:
        name: of its file, without the ending.
        title: heading of the page's section.
        figure: the drawing.
        sentence: what is seen, computed from the same numbers.
    """

    name: str
    title: str
    figure: Figure
    sentence: str


# ---- numbers ----------------------------------------------------------------------------------------------------


def curve(blocks: Iterable[BlockMeasures], value: Callable[[BlockMeasures], float | None]) -> Curve:
    """A figure of each block that has it."""
    return {b.block: v for b in blocks if (v := value(b)) is not None}


def layer_mean(name: str, *, per_token: bool = False) -> Callable[[BlockMeasures], float | None]:
    """The mean over a block's linear layers of one of `LinearMeasures`.

    Args:
        name: which one.
        per_token: divide it by the window's length.
    """

    def mean(block: BlockMeasures) -> float | None:
        known = [v for m in block.linears.values() if (v := getattr(m, name)) is not None]
        return fmean(known) / (block.window_length if per_token else 1) if known else None

    return mean


def rank_correlation(values: Sequence[float]) -> float:
    """Spearman's rank correlation of a series with its index; 0 for a constant or for fewer than three values."""
    if len(values) < 3 or len(set(values)) == 1:
        return 0.0
    _, inverse, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # ties share their mean rank
    return float(np.corrcoef(np.arange(len(values)), ranks)[0, 1])


def direction(values: Curve) -> int:
    """1 if a curve rises with depth, -1 if it falls, 0 if it does neither."""
    correlation = rank_correlation([values[i] for i in sorted(values)])
    return int(math.copysign(1, correlation)) if abs(correlation) >= 0.5 else 0


def trend(values: Curve, *, worst: Literal["highest", "lowest"]) -> str:
    """`falls with depth, from 0.98 (block 0) to 0.61 (block 29), lowest in block 17 with 0.4`, or whatever it does.

    Args:
        values: the curve.
        worst: which of its extremes is told, if it lies between the ends.
    """
    first, last = min(values), max(values)
    if first == last:
        return f"is {values[first]:.3g} in block {first}, the only one"
    text = f"from {values[first]:.3g} (block {first}) to {values[last]:.3g} (block {last})"
    place = (max if worst == "highest" else min)(sorted(values), key=lambda i: values[i])
    if values[place] not in (values[first], values[last]):
        text += f", {worst} in block {place} with {values[place]:.3g}"
    verb = {1: "rises with depth", -1: "falls with depth", 0: "has no steady trend with depth"}[direction(values)]
    return f"{verb}, {text}"


def share(values: Curve, other: Curve, better: Callable[[float, float], bool]) -> tuple[int, int]:
    """In how many of the blocks that two curves have in common the first is better, and their number."""
    common = values.keys() & other.keys()
    return sum(better(values[i], other[i]) for i in common), len(common)


def extreme(curves: Sequence[tuple[Run, str, Curve]], *, highest: bool) -> Run | None:
    """The run with the highest (or lowest) mean over the blocks that all of them have; None if they share none."""
    common = set.intersection(*(set(values) for _, _, values in curves)) if curves else set()
    if not common:
        return None
    means = [(fmean(values[i] for i in common), run) for run, _, values in curves]
    return (max if highest else min)(means, key=lambda mr: mr[0])[1]


# ---- drawing ----------------------------------------------------------------------------------------------------


def panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of panels under each other that share the x axis."""
    figure = Figure(figsize=(WIDTH, height * count + 0.7), layout="constrained")
    axes = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    return figure, list(axes)


def plot(ax: Axes, values: Curve, colour: str, line: LineStyle = "-") -> None:
    """One curve; a single block is a dot."""
    at = sorted(values)
    ax.plot(at, [values[i] for i in at], line, color=colour, marker="o", markersize=3 if len(at) > 1 else 6)


def label_depth(ax: Axes) -> None:
    """The x axis of figures over blocks."""
    ax.set_xlabel("decoder block (0 is the first)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def legend(figure: Figure, runs: Sequence[Run], lines: dict[str, LineStyle] | None = None) -> None:
    """Above the panels: runs by colour in a first column, kinds of line in a second one. A single run needs no name."""
    names = [Line2D([], [], color=c, label=printable(r.name)) for r, c in zip(runs, COLOURS, strict=False)]
    names = names if len(runs) > 1 else []
    colour = "#111111" if names else COLOURS[0]
    kinds = [Line2D([], [], color=colour, linestyle=s, label=text) for text, s in (lines or {}).items()]
    if names and kinds:  # legends fill columns first
        gaps = len(names) - len(kinds)
        nothing = Line2D([], [], linestyle="none", label=" ")
        names, kinds = names + [nothing] * -gaps, kinds + [nothing] * gaps
    if names or kinds:
        figure.legend(handles=names + kinds, loc="outside upper left", ncols=2, frameon=False)


def plain_log(*axes: Axis) -> None:
    """Numbers rather than powers of ten on logarithmic axes."""
    for axis in axes:
        low, high = axis.get_view_interval()
        wide = low > 0 and high / low > 300
        axis.set_major_locator(LogLocator(10, subs=(1,) if wide else (1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())


def png(drawing: Drawing, dpi: int) -> bytes:
    """The figure as a PNG file; the same figure gives the same bytes, because no date or version is inside."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a run's name in a script that the font lacks
        drawing.figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def printable(name: str) -> str:
    """A run's name as matplotlib takes it: a leading underscore would hide it from the legend."""
    return f"run {name}" if name.startswith("_") else name


def short_names(layers: Sequence[str]) -> list[str]:
    """The last part of each layer's name, the whole name where that would not tell it from another."""
    counts = Counter(n.rpartition(".")[2] for n in layers)
    return [last if counts[last := n.rpartition(".")[2]] == 1 else n for n in layers]


def prefix(run: Run, runs: Sequence[Run]) -> str:
    """The name that opens a run's part of a sentence; nothing if there is only one run."""
    return f"{run.name}: " if len(runs) > 1 else ""


def sentence(parts: list[str], runs: Sequence[Run] = ()) -> str:
    """Parts as one sentence. Where several runs are told about it opens with a name, which keeps its spelling."""
    text = "; ".join(parts)
    return (text if len(runs) > 1 else text[:1].upper() + text[1:]) + "."


def measured(runs: Sequence[Run], value: Callable[[BlockMeasures], float | None]) -> list[tuple[Run, str, Curve]]:
    """Runs that have a figure at all, with their colours and curves."""
    found = [(r, c, curve(r.blocks, value)) for r, c in zip(runs, COLOURS, strict=False)]
    return [(r, c, values) for r, c, values in found if values]
