"""The table of `litbinq compare`: from what every run left behind to JSON, and from that JSON to Markdown.

Computes means, spreads and ratios, nothing else.
"""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from lit_binq.compare.plan import Plan, Run

Record = dict[str, Any]

INPUT_BITS = {"activation_bits": "input bits", "kv_bits": "KV bits"}
"""Figures of a run that have a column where any row quantizes what they are about."""

FULL_BITS = 16
"""What is not quantized counts as 16 bits, also in runs that did not report it."""


def spread(values: Iterable[float]) -> dict[str, float]:
    """Mean, least and greatest; what is not finite makes the mean so too."""
    numbers = list(values)
    return {"mean": sum(numbers) / len(numbers), "min": min(numbers), "max": max(numbers)}


def build(plan: Plan, records: dict[Run, Record | None], command: str) -> dict[str, Any]:
    """The table as JSON.

    Args:
        plan: the comparison.
        records: what is known of every run (lit_binq.compare.runner); None where nothing is.
        command: what makes this table.

    Returns:
        `rows` as the plan has them, `references`, `full_precision` (each with what it was measured on), and what
        stands under the table: command, devices, versions, data.
    """
    done = {run: record for run, record in records.items() if record and record["state"] == "done"}
    full: dict[str, dict[str, Any]] = {}
    for run, record in done.items():
        if record["full_precision"]:
            entry = full.setdefault(record["fp_digest"], {"model": record["results"]["model"], "rows": []})
            entry["rows"] += [run.row] * (run.row not in entry["rows"])
            entry["perplexity"] = record["full_precision"]
    return {
        "command": command,
        "corpora": plan.corpora,
        "full_precision": list(full.values()),
        "rows": [_row(name, runs, records) for name, runs in plan.rows.items()],
        "references": [asdict(reference) for reference in plan.references],
        "devices": _distinct(record["results"].get("device") for record in done.values()),
        "versions": _distinct(_versions(record["results"]) for record in done.values()),
        "calibration_tokens": _distinct(record["results"]["calibration_tokens"] for record in done.values()),
        "data": _data(done),
    }


def _row(name: str, runs: list[Run], records: dict[Run, Record | None]) -> dict[str, Any]:
    seeds: list[dict[str, Any]] = []
    for run in runs:
        seeds.append({"seed": run.seed, "folder": str(run.folder), "state": "not run", **(records[run] or {})})
    row: dict[str, Any] = {"method": name, "seeds": seeds}
    done = [s for s in seeds if s["state"] == "done"]
    if not done:
        return row | {"state": "failed" if any(s["state"] == "failed" for s in seeds) else "not run"}
    results = [s["results"] for s in done]
    perplexity: dict[str, dict[str, float]] = {}
    for corpus in results[0]["perplexity"]:
        perplexity[corpus] = spread(r["perplexity"][corpus]["packed"] for r in results)
        if done[0]["full_precision"]:
            perplexity[corpus]["ratio"] = perplexity[corpus]["mean"] / done[0]["full_precision"][corpus]
    memory = [r["calibration_peak_memory"] for r in results if r.get("calibration_peak_memory")]
    return row | {
        "state": "done" if len(done) == len(seeds) else "incomplete",
        "true_bits": spread(r["true_bits"] for r in results),
        "file_bits": spread(r["file_bits"] for r in results),
        **{key: spread(r.get(key, FULL_BITS) for r in results) for key in INPUT_BITS},
        "perplexity": perplexity,
        "seconds": spread(r["calibration_seconds"] for r in results),
        "peak_memory": {
            key: max((m[key] for m in memory if m.get(key) is not None), default=None)
            for key in ("host_bytes", "device_bytes")
        },
    }


def _versions(results: Record) -> str | None:
    versions = results.get("versions")
    return ", ".join(f"{name} {version}" for name, version in versions.items()) if versions else None


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(v for v in values if v is not None))


def _data(done: dict[Run, Record]) -> list[dict[str, Any]]:
    """Every distinct line about calibration and evaluation data, with the rows it holds for."""
    lines: dict[str, list[str]] = {}
    for run, record in done.items():
        for line in str(record["results"].get("data", "")).splitlines():
            rows = lines.setdefault(line, [])
            rows += [run.row] * (run.row not in rows)
    return [{"line": line, "rows": rows} for line, rows in lines.items()]


# ---- Markdown ---------------------------------------------------------------------------------------------------


def perplexity_text(value: float) -> str:
    """A perplexity: two decimals below 1000, none above."""
    return f"{value:.2f}" if value < 999.995 else f"{value:,.0f}"  # inf and nan write themselves


def ratio_text(value: float) -> str:
    """A ratio with three digits, or all before the point."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def cell(text: str) -> str:
    """Text that cannot break a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _with_ratio(entry: dict[str, float], seeds: int) -> str:
    if not entry:
        return ""
    text = perplexity_text(entry["mean"]) if "mean" in entry else ""
    if "ratio" in entry:
        text += f" ({ratio_text(entry['ratio'])})"
    if seeds > 1:
        text += f" [{perplexity_text(entry['min'])} to {perplexity_text(entry['max'])}]"
    return text.strip()


def _giga(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.1f}"


def _bits(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def markdown(table: dict[str, Any]) -> str:
    """The table `build` made, as Markdown that ends with a newline."""
    corpora = table["corpora"]
    shown = [k for k in INPUT_BITS if any(row.get(k, {}).get("mean", FULL_BITS) < FULL_BITS for row in table["rows"])]
    bits = ["true bits", "file bits", *(INPUT_BITS[key] for key in shown)]
    head = ["method", *bits, *map(cell, corpora), "seconds", "host GB", "device GB"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]

    def add(*cells: str) -> None:
        lines.append("| " + " | ".join([*cells, *[""] * (len(head) - len(cells))]) + " |")

    full = table["full_precision"]
    for entry in full:
        name = "full precision" if len(full) == 1 else f"full precision ({_of(entry['rows'])})"
        values = (entry["perplexity"].get(corpus) for corpus in corpora)
        add(cell(name), *("" for _ in bits), *("" if v is None else perplexity_text(v) for v in values))
    for row in table["rows"]:
        done = sum(seed["state"] == "done" for seed in row["seeds"])
        name = cell(row["method"])
        if not done:
            add(name, row["state"])
            continue
        if row["state"] == "incomplete":
            name += f" ({done} of {len(row['seeds'])} seeds)"
        add(
            name,
            _bits(row["true_bits"]["mean"], 3),
            _bits(row["file_bits"]["mean"], 2),
            *(_bits(row[key]["mean"], 2) for key in shown),
            *(_with_ratio(row["perplexity"].get(corpus, {}), done) for corpus in corpora),
            f"{row['seconds']['mean']:.0f}",
            _giga(row["peak_memory"]["host_bytes"]),
            _giga(row["peak_memory"]["device_bytes"]),
        )
    for i, reference in enumerate(table["references"], 1):
        add(
            f"{cell(reference['name'])} [{i}]",
            _bits(reference["true_bits"], 2),
            _bits(reference["file_bits"], 2),
            *("" for _ in shown),
            *(_with_ratio(_figures(reference, corpus), 1) for corpus in corpora),
            _bits(reference["seconds"], 0),
        )
    return "\n".join([*lines, "", *_notes(table)]) + "\n"


def _figures(reference: dict[str, Any], corpus: str) -> dict[str, float]:
    named = {"mean": reference["perplexity"].get(corpus), "ratio": reference["ratio"].get(corpus)}
    return {key: value for key, value in named.items() if value is not None}


def _of(rows: list[str]) -> str:
    return ", ".join(map(cell, rows))


def _notes(table: dict[str, Any]) -> list[str]:
    """What stands under the table, one paragraph a line."""
    tokens = [f"{n:,} calibration tokens" for n in table["calibration_tokens"]]
    made = "; ".join([*table["devices"], *table["versions"], *tokens])
    notes = [f"`{table['command']}`" + (f" ({made})" if made else "")]
    meaning = "Perplexity, in parentheses its ratio to full precision; seconds and peak memory of the calibration"
    if any(sum(s["state"] == "done" for s in row["seeds"]) > 1 for row in table["rows"]):
        meaning += "; with several seeds the mean and [least to greatest], of memory the greatest"
    notes.append(f"{meaning}.")
    everyone = [row["method"] for row in table["rows"] if any(s["state"] == "done" for s in row["seeds"])]
    for entry in table["data"]:
        whose = "" if entry["rows"] == everyone else f"{_of(entry['rows'])}: "
        line = entry["line"]
        notes.append(f"{whose}{line}" if whose else line[:1].upper() + line[1:])
    notes += [f"[{i}] {reference['source']}" for i, reference in enumerate(table["references"], 1)]
    for row in table["rows"]:
        for seed in row["seeds"]:
            if seed["state"] == "failed":
                notes.append(f"{cell(row['method'])}, seed {seed['seed']}, failed: {seed['error']}")
    return [paragraph for note in notes for paragraph in (note, "")][:-1]
