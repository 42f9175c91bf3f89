"""The figures of a report over depth, each with one sentence that is computed from what it shows.

Legend: x, x~, W, W^, G as in lit_binq.utils.json_records. A curve is a run's mean over the linear layers of each block.
"""

from collections.abc import Sequence
from statistics import fmean, median

import matplotlib
import numpy as np

from lit_binq.report.plotting import (
    COLOURS,
    STYLE,
    Drawing,
    LineStyle,
    direction,
    extreme,
    label_depth,
    layer_mean,
    legend,
    measured,
    panels,
    plain_log,
    plot,
    prefix,
    printable,
    sentence,
    share,
    short_names,
    trend,
)
from lit_binq.report.probe_figures import probe_bars, probe_pairs
from lit_binq.report.runs import Run


def stage_losses(runs: Sequence[Run]) -> Drawing | None:
    """Loss of each block before and after tuning, as the fit itself reported it."""
    drawn = [r for r in runs if r.block_stages()]
    if not drawn:
        return None
    figure, (ax,) = panels(1, 3.6)
    parts = []
    for run, colour in zip(runs, COLOURS, strict=False):
        stages = run.block_stages()
        before = {i: s.before for i, s in enumerate(stages) if s.before is not None}
        after = {i: s.after for i, s in enumerate(stages) if s.after is not None}
        tuned = any(s.epochs for s in stages)
        if tuned:
            plot(ax, before, colour, "--")
        plot(ax, after, colour)
        if not after:
            continue
        part = f"{prefix(run, runs)}the loss {trend(after, worst='highest')}"
        gains = [1 - after[i] / before[i] for i in after.keys() & before.keys() if before[i] > 0]
        if tuned and gains:
            lower = sum(g > 0 for g in gains)
            part += f", and tuning lowers it in {lower} of {len(gains)} blocks, by {median(gains):.0%} in the median"
        elif not tuned:
            part += ", by the closed form alone"
        parts.append(part)
    ax.set_ylabel("relative squared error (1)")
    if all(v > 0 for line in ax.get_lines() for v in np.asarray(line.get_ydata(), dtype=float)):
        ax.set_yscale("log")
        plain_log(ax.yaxis)
    label_depth(ax)
    lines: dict[str, LineStyle] = {"closed form": "--", "after tuning": "-"}
    legend(figure, runs, lines if any(s.epochs for r in drawn for s in r.block_stages()) else None)
    return Drawing("stages", "Loss of each block", figure, sentence(parts, runs)) if parts else None


def layer_errors(runs: Sequence[Run]) -> Drawing | None:
    """Weight, activation-conditioned and output error of the layers, one panel each."""
    kinds = {
        "weight": "|W - Ŵ| / |W|",
        "activation": "|Wx~ - Ŵx~| / |Wx~|",
        "output": "|Wx - Ŵx~| / |Wx|",
    }
    titles = {"weight": "weight error", "activation": "activation-conditioned error", "output": "output error"}
    curves = {k: measured(runs, layer_mean(f"{k}_error_relative")) for k in kinds}
    if not any(curves.values()):
        return None
    figure, axes = panels(3, 2.3)
    for ax, (kind, unit) in zip(axes, kinds.items(), strict=True):
        for _, colour, values in curves[kind]:
            plot(ax, values, colour)
        ax.set_title(titles[kind], loc="left")
        ax.set_ylabel(unit)
        ax.set_ylim(bottom=0)
    label_depth(axes[-1])
    legend(figure, runs)
    parts = [f"{prefix(r, runs)}the output error {trend(values, worst='highest')}" for r, _, values in curves["output"]]
    if len(curves["output"]) > 1:
        lowest = {titles[k]: run.name for k, c in curves.items() if (run := extreme(c, highest=False))}
        parts += [f"the lowest {title} on average is {name}'s" for title, name in lowest.items()]
    return Drawing("errors", "Errors of the linear layers", figure, sentence(parts, runs))


def similarities(runs: Sequence[Run]) -> Drawing | None:
    """Activation-conditioned and output similarity over depth."""
    activation, output = (measured(runs, layer_mean(f"{k}_similarity")) for k in ("activation", "output"))
    if not output:
        return None
    figure, (ax,) = panels(1, 3.9)
    for _, colour, values in activation:
        plot(ax, values, colour, "--")
    for _, colour, values in output:
        plot(ax, values, colour)
    ax.set_title("mean over tokens and layers", loc="left")
    ax.set_ylabel("cosine (1)")
    ax.set_ylim(top=1.0)
    label_depth(ax)
    legend(figure, runs, {"activation-conditioned, cos(Wx~, Ŵx~)": "--", "output, cos(Wx, Ŵx~)": "-"})
    parts = []
    for (run, _, values), (_, _, conditioned) in zip(output, activation, strict=False):
        gap = fmean(conditioned[i] - values[i] for i in values.keys() & conditioned.keys())
        part = f"{prefix(run, runs)}the output similarity {trend(values, worst='lowest')}, on average {abs(gap):.3f} "
        part += "below" if gap >= 0 else "above"
        parts.append(f"{part} the activation-conditioned one")
    best, own = extreme(activation, highest=True), extreme(output, highest=True)
    if len(activation) > 1 and best and own:
        values = next(v for r, _, v in output if r is best)
        later = [v for i, v in values.items() if i > min(values)]
        below = sum(v < values[min(values)] for v in later)
        parts.append(
            f"the highest activation-conditioned similarity on average is {best.name}'s, whose output similarity lies "
            f"below that of its first block in {below} of {len(later)} later ones, the highest output similarity is "
            f"{own.name}'s"
        )
    return Drawing("similarity", "Similarity of the linear layers' outputs", figure, sentence(parts, runs))


def token_interactions(runs: Sequence[Run]) -> Drawing | None:
    """Token-similarity errors over depth, as root mean square over pairs of tokens."""
    activation, output = (
        measured(runs, layer_mean(f"{k}_token_error_mean", per_token=True)) for k in ("activation", "output")
    )
    if not output:
        return None
    figure, (ax,) = panels(1, 3.9)
    for _, colour, values in activation:
        plot(ax, values, colour, "--")
    for _, colour, values in output:
        plot(ax, values, colour)
    ax.set_title("root mean square over pairs of tokens, mean over layers", loc="left")
    ax.set_ylabel("error of a cosine, |ΔG| / T (1)")
    ax.set_ylim(bottom=0)
    label_depth(ax)
    legend(figure, runs, {"activation-conditioned, G(Ŵx~) - G(Wx~)": "--", "output, G(Ŵx~) - G(Wx)": "-"})
    broken = {1: "interactions break down with depth", -1: "interactions recover with depth",
              0: "no steady break-down with depth shows"}  # fmt: skip
    parts = [
        f"{prefix(r, runs)}the output token-similarity error {trend(values, worst='highest')}: "
        f"{broken[direction(values)]}"
        for r, _, values in output
    ]
    return Drawing("tokens", "Interactions between tokens", figure, sentence(parts, runs))


def attention(runs: Sequence[Run]) -> Drawing | None:
    """Divergence of the attention maps over depth."""
    curves = measured(runs, lambda b: b.attention_divergence)
    if not curves:
        return None
    figure, (ax,) = panels(1, 3.4)
    for _, colour, values in curves:
        plot(ax, values, colour)
    ax.set_title("mean over heads and queries", loc="left")
    ax.set_ylabel("KL divergence (nats)")
    ax.set_ylim(bottom=0)
    label_depth(ax)
    legend(figure, runs)
    parts = []
    for run, _, values in curves:
        parts.append(f"{prefix(run, runs)}the divergence in nats {trend(values, worst='highest')}")
    return Drawing("attention", "Attention maps", figure, sentence(parts, runs))


def effective_ranks(runs: Sequence[Run]) -> Drawing | None:
    """Effective rank of the blocks' outputs and of their directions, quantized against full precision."""
    kinds = {"": "outputs as they are", "_directions": "directions of the outputs (unit length a token)"}
    figure, axes = panels(2, 2.6)
    parts = []
    for ax, (suffix, title) in zip(axes, kinds.items(), strict=True):
        full = measured(runs, lambda b, s=suffix: getattr(b.ranks, f"reference{s}"))  # type: ignore[misc]  # a bound default
        own = measured(runs, lambda b, s=suffix: getattr(b.ranks, f"quantized{s}"))  # type: ignore[misc]  # a bound default
        for _, _, values in full:
            plot(ax, values, "#999999", ":")
        for run, colour, values in own:
            plot(ax, values, colour)
            if not suffix:
                above, common = share(values, next((v for r, _, v in full if r is run), {}), lambda a, b: a > b)
                parts.append(
                    f"{prefix(run, runs)}the outputs' effective rank {trend(values, worst='lowest')}, above full "
                    f"precision in {above} of {common} blocks"
                )
        ax.set_title(title, loc="left")
        ax.set_ylabel("effective rank (1)")
        ax.set_ylim(bottom=0)
    if not parts:
        return None
    label_depth(axes[-1])
    legend(figure, runs, {"quantized": "-", "full precision (grey)": ":"})
    return Drawing("rank", "Effective rank of the blocks' outputs", figure, sentence(parts, runs))


def layer_map(runs: Sequence[Run]) -> Drawing | None:
    """Output similarity of every layer of every block, one panel a run."""
    drawn = [r for r in runs if any(b.linears for b in r.blocks)]
    if not drawn:
        return None
    names = list(dict.fromkeys(n for r in drawn for b in r.blocks for n in b.linears))
    blocks = max(b.block for r in drawn for b in r.blocks) + 1
    figure, axes = panels(len(drawn), max(2.0, 0.55 + 0.26 * len(names)))
    parts, grids = [], []
    for run in drawn:
        grid = np.full((len(names), blocks), np.nan)
        for b in run.blocks:
            for name, m in b.linears.items():
                grid[names.index(name), b.block] = np.nan if m.output_similarity is None else m.output_similarity
        grids.append(grid)
        if np.isfinite(grid).any():
            row, column = np.unravel_index(int(np.nanargmin(grid)), grid.shape)
            parts.append(
                f"{prefix(run, runs)}the least similar layer is {names[int(row)]} of block {column} with "
                f"{grid[row, column]:.3f}"
            )
    if not parts:
        return None
    low = min(0.0, *(float(np.nanmin(g)) for g in grids if np.isfinite(g).any()))
    for ax, run, grid in zip(axes, drawn, grids, strict=True):
        image = ax.imshow(grid, aspect="auto", cmap="viridis", vmin=low, vmax=1, interpolation="nearest")
        ax.set_yticks(range(len(names)), short_names(names), fontsize=9)
        ax.grid(visible=False)
        if len(drawn) > 1:
            ax.set_title(printable(run.name), loc="left")
    label_depth(axes[-1])
    figure.colorbar(image, ax=axes, label="output similarity, cosine (1)", shrink=0.9)
    return Drawing("layers", "Output similarity of every layer", figure, sentence(parts, runs))


def draw(runs: Sequence[Run]) -> list[Drawing]:
    """Every figure there is data for, in the order of the page."""
    with matplotlib.rc_context(STYLE):
        found = [f(runs) for f in (stage_losses, layer_errors)]
        for number, run in enumerate(runs):
            found += [probe_bars(run, runs, number), probe_pairs(run, runs, number)]
        found += [f(runs) for f in (similarities, token_interactions, attention, effective_ranks, layer_map)]
        return [d for d in found if d is not None]
