"""`litbinq report RUN`: figures and one self-contained page about a run, or about several on shared axes.

Everything is read from the run's files; nothing is measured here. The page embeds its figures and asks for no other
file, so that it can be sent around and read on a phone.

The figures need matplotlib (the extra `report`).
"""

import base64
import html
import logging
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_binq.errors import LitBinqError
from lit_binq.report.runs import Run, load_runs
from lit_binq.utils.files import new_folder
from lit_binq.utils.json_records import DIAGNOSTICS, LinearMeasures
from lit_binq.utils.places import require_folder

if TYPE_CHECKING:
    from lit_binq.report.plotting import Drawing

log = logging.getLogger(__name__)

PAGE = "report.html"
DPI = 170
MOST_RUNS = 6

CSS = """
body { color: #111; background: #fff; font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem;
       max-width: 46rem; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
figure { margin: 0; } img { width: 100%; height: auto; } figcaption { margin-top: .3rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; overflow-wrap: normal; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td.long { white-space: normal; min-width: 12rem; }
td { font-variant-numeric: tabular-nums; } summary { cursor: pointer; margin: .6rem 0; }
"""

MEASURES = """
<p>W and Ŵ are the weights of a linear layer in full precision and quantized; x and x~ are its inputs in the
full-precision model and in the model quantized so far. The <em>activation-conditioned</em> figures compare Ŵx~ with
Wx~, an output that the full-precision model never produces; the <em>output</em> figures compare it with Wx. G holds the
cosines between the outputs of every two tokens of a window. A curve is the mean over the linear layers of a block,
measured when the block was finished. Block losses are squared errors of a block's output, over its squared norm
(<em>block</em>), or of each token, averaged (<em>token</em>). The effective rank is exp of the entropy of the
normalised singular values. A trend with depth is called steady if its rank correlation (Spearman) with the number of
the block is at least 0.5 in size. The measures follow arXiv 2512.21651.</p>
"""


def report(run: str, out: str | None = None, baselines: list[str] | str | None = None) -> None:
    """Draw a run: figures and one self-contained page, report.html.

    Without diagnostics (option `diagnostics.windows` of the fit) only the losses of the stages can be drawn.

    Args:
        run: packed folder written by `litbinq fit`, or the folder around it.
        out: folder to write; RUN/report if not given (beside RUN, as RUN-report, if RUN is the packed folder itself).
        baselines: other runs to draw into the same figures: one folder, several with commas between them, or a list.

    Raises:
        LitBinqError: a run that cannot be read, a place that cannot be written to, or matplotlib is missing.
    """
    runs = load_runs([run, *_folders(baselines)])
    if len(runs) > MOST_RUNS:
        raise LitBinqError(f"baselines: got {len(runs) - 1} other runs, expected at most {MOST_RUNS - 1}")
    target = Path(out) if out is not None else _default_target(Path(run), runs[0])
    require_folder(target, "out", PAGE)
    figures, plotting = _drawing_modules()
    drawings: list[Drawing] = figures.draw(runs)
    with new_folder(target) as work:
        pictures = {}
        for drawing in drawings:
            pictures[drawing.name] = png = plotting.png(drawing, DPI)
            (work / f"{drawing.name}.png").write_bytes(png)
        (work / PAGE).write_text(page(runs, drawings, pictures), encoding="utf-8")
    for drawing in drawings:
        print(f"{drawing.title}: {drawing.sentence}")
    for r in runs:
        if not r.blocks:
            log.info("%s has no %s: fit with `diagnostics.windows` above 0 for more figures", r.name, DIAGNOSTICS)
    print(f"wrote {target / PAGE}")


def _folders(baselines: list[str] | str | None) -> list[str]:
    if isinstance(baselines, str):
        return [baselines] if Path(baselines).is_dir() else [part for part in baselines.split(",") if part]
    return baselines or []


def _default_target(folder: Path, run: Run) -> Path:
    """Never inside a packed folder: its size is counted, and a new fit would replace it."""
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}-report") if folder == run.packed.resolve() else folder / "report"


def _drawing_modules() -> tuple[Any, Any]:
    try:
        from lit_binq.report import figures, plotting
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise LitBinqError(
            "report: matplotlib is not installed, expected the extra `report`: pip install 'lit-binq[report]'"
        ) from error
    return figures, plotting


# ---- the page ---------------------------------------------------------------------------------------------------


def page(runs: Sequence[Run], drawings: "Sequence[Drawing]", pictures: dict[str, bytes]) -> str:
    """The page as HTML.

    Args:
        runs: what is reported.
        drawings: the figures, in order.
        pictures: their PNG files by name.
    """
    title = html.escape(f"lit_binq: {', '.join(r.name for r in runs)}")
    parts = [
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>',
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{CSS}</style>\n</head>\n<body>',
        f"<h1>{title}</h1>",
        _facts(runs),
    ]
    for r in runs:
        if not r.blocks:
            parts.append(
                f"<p>{html.escape(r.name)} has no diagnostics: only the losses of its stages are drawn. Fit with "
                "<code>diagnostics.windows</code> above 0 for the other figures.</p>"
            )
    for d in drawings:
        data = base64.b64encode(pictures[d.name]).decode()
        sentence, heading = html.escape(d.sentence), html.escape(d.title)
        parts.append(
            f'<h2>{heading}</h2>\n<figure><img alt="{heading}" src="data:image/png;base64,{data}">\n'
            f"<figcaption>{sentence}</figcaption></figure>"
        )
    parts += ["<h2>The numbers</h2>"]
    for r in runs:
        parts += [_stages(r), _blocks(r), _linears(r), _notes(r)]
    parts += ["<h2>What the measures are</h2>", MEASURES if any(r.blocks for r in runs) else "", "</body>\n</html>\n"]
    return "\n".join(p for p in parts if p)


def number(value: Any) -> str:
    """A figure for a table: four significant digits, a dash if there is none."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(head: Iterable[str], rows: Iterable[Iterable[Any]], *, long: bool = False) -> str:
    """An HTML table that scrolls sideways on a narrow screen.

    Args:
        head: column names.
        rows: cells; floats with four digits.
        long: let cells wrap.
    """
    cell = '<td class="long">' if long else "<td>"
    lines = ["<tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"{cell}{html.escape(number(v))}</td>" for v in row) + "</tr>" for row in rows]
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _facts(runs: Sequence[Run]) -> str:
    rows: list[tuple[str, list[Any]]] = [
        ("model", [r.facts.get("source") for r in runs]),
        ("true bits", [r.true_bits for r in runs]),
        ("objective", [r.option("closed_form", "objective") for r in runs]),
        ("shrinkage", [r.option("closed_form", "shrinkage") for r in runs]),
        ("tuning epochs", [r.option("tuning", "epochs") for r in runs]),
        ("calibration", [_rules(r) for r in runs]),
        ("calibration tokens", [r.facts.get("calibration_tokens") for r in runs]),
        ("seconds", [r.facts.get("calibration_seconds") for r in runs]),
        ("device", [r.facts.get("device") for r in runs]),
        ("blocks measured", [len(r.blocks) for r in runs]),
        ("measured on", [_windows(r) for r in runs]),
    ]
    known = [(name, *values) for name, values in rows if any(v is not None for v in values)]
    return table(["", *(r.name for r in runs)], known, long=True)


def _rules(run: Run) -> Any:
    data = run.facts.get("data")
    return data.get("rules") if isinstance(data, dict) else None


def _windows(run: Run) -> str | None:
    return f"{run.blocks[0].windows} windows of {run.blocks[0].window_length} tokens" if run.blocks else None


def _details(run: Run, what: str, body: str) -> str:
    return f"<details><summary>{html.escape(run.name)}: {what}</summary>\n{body}\n</details>"


def _stages(run: Run) -> str:
    if not run.stages:
        return ""
    head = ["stage", "loss before", "after", "epochs", "best", "seconds"]
    rows = [(s.title, s.before, s.after, s.epochs, s.best_epoch, s.seconds) for s in run.stages]
    return _details(run, "stages", table(head, rows))


def _blocks(run: Run) -> str:
    if not run.blocks:
        return ""
    head = ["block", "block loss, closed form", "block loss", "token loss, closed form", "token loss",
            "attention KL (nats)", "rank, full precision", "rank", "rank of directions, full precision",
            "rank of directions"]  # fmt: skip
    rows = []
    for b in run.blocks:
        before = (b.before.block, b.before.token) if b.before else (None, None)
        ranks = b.ranks
        rows.append(
            (str(b.block), before[0], b.after.block, before[1], b.after.token, b.attention_divergence, ranks.reference,
             ranks.quantized, ranks.reference_directions, ranks.quantized_directions)
        )  # fmt: skip
    return _details(run, "blocks", table(head, rows))


def _linears(run: Run) -> str:
    names = [f.name for f in fields(LinearMeasures)]
    rows = [(f"{b.block} {name}", *(getattr(m, n) for n in names)) for b in run.blocks for name, m in b.linears.items()]
    if not rows:
        return ""
    return _details(run, "linear layers", table(["block, layer", *(n.replace("_", " ") for n in names)], rows))


def _notes(run: Run) -> str:
    notes = [f"block {b.block}: {note}" for b in run.blocks for note in b.notes]
    items = "".join(f"<li>{html.escape(n)}</li>" for n in notes)
    return _details(run, "what could not be measured", f"<ul>{items}</ul>") if notes else ""
