"""`litbinq compare`: a table of methods, every row a `litbinq fit` of its own, from one YAML file.

The YAML file is explained in lit_binq.compare.plan. Under the folder `out`:

    table.md, table.json        written anew after every run
    ROW/seed-S/fit.yaml         complete options of the run; `litbinq fit --config` on it does it again
    ROW/seed-S/fit.log          what the fit said
    ROW/seed-S/run.json         whether it is done, with which options, and its results
    ROW/seed-S/packed, checkpoint

A run is a process of its own, so that its peak memory is its own and its failure stays in its row. A run is done once:
as long as its options and the content of the text and model files they name are the same, it is not run again. One
that failed or was interrupted is tried again by the next call, from its beginning: its seconds are those of one fit.
The full-precision model is measured by the first run of those with the same evaluation data.

Knows nothing of torch; `litbinq fit` is a command to it.
"""

import json
import logging
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_binq.compare.plan import Plan, Run, merge, read_plan
from lit_binq.compare.table import Record, build, markdown, perplexity_text, ratio_text
from lit_binq.errors import LitBinqError
from lit_binq.utils.files import numbers, write_bytes, write_json

log = logging.getLogger(__name__)

RECORD, OPTIONS, LOG, RESULTS = "run.json", "fit.yaml", "fit.log", "results.json"


def compare(config: str, only: Sequence[str] | None = None) -> tuple[str, list[str]]:
    """Run the rows that are not done and write the table.

    Args:
        config: the YAML file.
        only: names of rows to run; None means all. The table shows every row in any case.

    Returns:
        The table as Markdown, and the names of the chosen rows that failed.

    Raises:
        LitBinqError: a plan that cannot be carried out. A fit's own failure is a row's, and raises nothing.
    """
    plan = read_plan(Path(config))
    chosen = _choose(plan, only)
    records = {run: _known(run) for run in plan.runs}
    todo = [run for run in chosen if (records[run] or {}).get("state") != "done"]
    for run in todo:
        _require_ours(run)
    command = f"litbinq compare --config {shlex.quote(config)}"
    log.info("%d of %d runs are done, the others' logs go to %s", len(chosen) - len(todo), len(chosen), plan.out)
    for number, run in enumerate(chosen, 1):
        if run in todo:
            records[run] = _execute(plan, run)
            _write(plan, records, command)
        _report(number, len(chosen), run, records, [r for r in chosen[number:] if r in todo])
    table = _write(plan, records, command)
    return table, list(dict.fromkeys(run.row for run in chosen if (records[run] or {}).get("state") != "done"))


def _choose(plan: Plan, only: Sequence[str] | None) -> list[Run]:
    for name in only or ():
        if name not in plan.rows:
            raise LitBinqError(f"--only: no row {name!r} in {str(plan.path)!r}, expected one of {', '.join(plan.rows)}")
    return [run for run in plan.runs if only is None or run.row in only]


def _read_record(path: Path) -> Record | None:
    """A run's record; None if there is none, or a half-written one."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or "state" not in record:
        return None
    try:
        if "results" in record:
            _restore(record["results"])
        if record.get("full_precision"):
            record["full_precision"] = numbers(record["full_precision"])
    except (KeyError, TypeError, AttributeError):  # JSON of another shape
        return None
    return record


def _known(run: Run) -> Record | None:
    """The run's record if it belongs to these very options."""
    record = _read_record(run.folder / RECORD)
    return None if record is None or record.get("digest") != run.digest else record


def _full_precision(run: Run, runs: Sequence[Run]) -> dict[str, float] | None:
    """Full precision's perplexities on this run's evaluation data, by corpus, if any of `runs` has them."""
    for other in runs:
        record = _read_record(other.folder / RECORD)
        if record and record["state"] == "done" and record["fp_digest"] == run.fp_digest:
            return record["full_precision"]
    return None


def _require_ours(run: Run) -> None:
    """Refuse to empty a folder that is not a run's."""
    folder = run.folder
    if folder.exists() and not folder.is_dir():
        raise LitBinqError(f"out: {str(folder)!r} is a file, expected a new folder: change `out`")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).is_file():
        raise LitBinqError(
            f"out: {str(folder)!r} holds files that are not of a comparison, expected a new folder: change `out`"
        )


def _execute(plan: Plan, run: Run) -> Record:
    """Do one run and keep its record."""
    folder = run.folder
    full_precision = None if run.fp_digest is None else _full_precision(run, plan.runs)
    record: Record = {"state": "running", "digest": run.digest, "fp_digest": run.fp_digest}
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise LitBinqError(
            f"out: {str(folder)!r} cannot be written ({error.strerror}), expected a folder in a writable place"
        ) from error
    write_json(folder / RECORD, record)
    options = folder / OPTIONS
    write_bytes(options, _fit_options(run, measure=run.fp_digest is not None and full_precision is None).encode())
    began = time.monotonic()
    code = fit(options, folder / LOG)
    record["wall_seconds"] = round(time.monotonic() - began, 1)
    results = _read_results(folder / RESULTS)
    if code or results is None:
        record |= {"state": "failed", "error": _reason(folder / LOG, code)}
    else:
        if full_precision is None and run.fp_digest is not None:
            full_precision = {name: values["fp"] for name, values in results["perplexity"].items()}
        record |= {"state": "done", "results": results, "full_precision": full_precision}
        if not plan.keep:
            for name in ("packed", "checkpoint"):
                shutil.rmtree(folder / name, ignore_errors=True)
    write_json(folder / RECORD, record)
    return record


def _fit_options(run: Run, *, measure: bool) -> str:
    """The YAML file of one fit; opens with the command that runs it."""
    folder = run.folder
    places: dict[str, Any] = {
        "model": {"packed": str(folder / "packed"), "compare_fp": measure},
        "checkpoint": {"dirpath": str(folder / "checkpoint")},
        "results": str(folder / RESULTS),
        "evaluate": True,
    }
    text = yaml.safe_dump(merge(run.options, places), sort_keys=False, allow_unicode=True)
    return f"# litbinq fit --config {shlex.quote(str(folder / OPTIONS))}\n{text}"


def fit(options: Path, output: Path) -> int:
    """Run `litbinq fit --config OPTIONS` as a process of its own.

    Args:
        options: the YAML file.
        output: file for what it says.

    Returns:
        Its exit code; below 0 the signal that ended it.
    """
    command = [sys.executable, "-m", "lit_binq", "fit", "--config", str(options)]
    with output.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        try:
            return process.wait()
        except BaseException:  # told to stop: so is the fit, which has things to put away
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
            raise


def _read_results(path: Path) -> Record | None:
    try:
        return _restore(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or JSON of another shape
        return None


def _restore(results: Record) -> Record:
    """Results with perplexities that are numbers again where JSON has null."""
    results["perplexity"] = {name: numbers(values) for name, values in results["perplexity"].items()}
    return results


def _reason(path: Path, code: int) -> str:
    """Why a fit failed, in one line: the last it said, and the signal if one ended it."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it said nothing"]
    last = lines[-1].removeprefix("litbinq fit: error: ")
    if code < 0:
        hint = ", out of memory?" if -code == signal.SIGKILL else ""
        return f"ended by signal {-code}{hint} after: {last}"
    return last if code else f"no results were written after: {last}"


def _write(plan: Plan, records: dict[Run, Record | None], command: str) -> str:
    """Write both tables; returns the Markdown one."""
    table = build(plan, records, command)
    text = markdown(table)
    write_json(plan.out / "table.json", table)
    write_bytes(plan.out / "table.md", text.encode())
    return text


def _report(number: int, count: int, run: Run, records: dict[Run, Record | None], left: list[Run]) -> None:
    """One line a run: i/n, name, bits, perplexities, seconds, time left."""
    record = records[run]
    assert record is not None
    name = run.row if len({r.seed for r in records}) == 1 else f"{run.row}, seed {run.seed}"
    walls = [r["wall_seconds"] for r in records.values() if r and r["state"] == "done"]
    seconds = statistics.mean(walls) * len(left) if walls and left else 0
    later = f", {int(seconds) // 60}:{int(seconds) % 60:02d} left" if seconds else ""
    if record["state"] != "done":
        log.info("%d/%d %s: failed, %s%s", number, count, name, record["error"], later)
        return
    results, full = record["results"], record["full_precision"] or {}
    figures = ", ".join(
        f"{corpus} {perplexity_text(values['packed'])}"
        + (f" ({ratio_text(values['packed'] / full[corpus])})" if corpus in full else "")
        for corpus, values in results["perplexity"].items()
    )
    took = f"{results['calibration_seconds']:.0f} s"
    log.info("%d/%d %s: %.3f bits, %s, %s%s", number, count, name, results["true_bits"], figures, took, later)
