"""`litbinq compare`: what is run and what is not, the table; one comparison with real fits."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_model

from comparing import ROWS, lines_of, write
from lit_binq.cli import main as cli
from lit_binq.compare import runner as compare
from lit_binq.compare import table as compare_table
from lit_binq.utils.files import write_json

# ---- runs ---------------------------------------------------------------------------------------------------------


def test_a_table_is_made_once(place, fits, capsys):
    references = [{"name": "Q2_K", "true_bits": 2.93, "ratio": {"wiki": 2.24}, "source": "llama.cpp, 8 windows"}]
    config = write(references=references)
    assert cli.main(["compare", "--config", config]) == 0
    out = capsys.readouterr().out
    rows = lines_of(out)
    assert rows["method"] == ["true bits", "file bits", "wiki", "c4", "seconds", "host GB", "device GB"]
    assert rows["full precision"] == ["", "", "25.00", "40.00", "", "", ""]
    assert rows["weight"] == ["1.046", "4.41", "200.00 (8.00)", "2,000 (50.0)", "35", "3.9", ""]
    assert rows["true target"] == ["1.046", "4.41", "100.00 (4.00)", "1,000 (25.0)", "35", "3.9", ""]
    assert rows["Q2_K [1]"] == ["2.93", "", "(2.24)", "", "", "", ""]
    notes = [line for line in out.splitlines() if line and not line.startswith("|")]
    assert notes[0] == "`litbinq compare --config compare.yaml` (a device; torch 2.13.0; 124,928 calibration tokens)"
    assert notes[2:] == [
        "Calibration: train.txt; fingerprint 1",
        "Evaluation: wiki.txt",
        "[1] llama.cpp, 8 windows",
    ]
    assert Path("out/table.md").read_text() == out
    table = json.loads(Path("out/table.json").read_text())
    assert table["rows"][0]["perplexity"]["wiki"] == {"mean": 200.0, "min": 200.0, "max": 200.0, "ratio": 8.0}
    assert fits.seen == ["weight/0", "true-target/0"]
    assert fits.measured == ["weight"]  # full precision once

    logs = {p: p.stat().st_mtime_ns for p in Path("out").rglob("fit.log")}
    assert cli.main(["compare", "--config", config]) == 0
    assert capsys.readouterr().out == out
    assert len(fits.seen) == 2
    assert {p: p.stat().st_mtime_ns for p in Path("out").rglob("fit.log")} == logs


def test_a_row_s_options_file_runs_it(place, fits):
    compare.compare(write())
    path = Path("out/true-target/seed-0/fit.yaml")
    text = path.read_text()
    assert text.startswith(f"# litbinq fit --config {path}\n")
    options = yaml.safe_load(text)
    assert options["model"] == {
        "model": "model.gguf",
        "packed": "out/true-target/seed-0/packed",
        "closed_form": {"objective": "true_target", "shrinkage": 0.3},
        "seed": 0,
        "compare_fp": False,
    }
    assert options["checkpoint"] == {"dirpath": "out/true-target/seed-0/checkpoint"}
    assert options["results"] == "out/true-target/seed-0/results.json"


def test_only_what_changed_is_run_again(place, fits):
    compare.compare(write())
    changed = ROWS | {"weight": {"model.closed_form": {"objective": "weight", "shrinkage": 0.5}}}
    table, failed = compare.compare(write(rows=changed))
    assert fits.seen[2:] == ["weight/0"]
    assert failed == []
    assert fits.measured == ["weight"]  # the other row still knows full precision
    assert lines_of(table)["weight"][2] == "200.00 (8.00)"
    compare.compare(write(rows=changed, seeds=[0, 1]))
    assert fits.seen[3:] == ["weight/1", "true-target/1"]
    Path("wiki.txt").write_text("another text")
    compare.compare(write(rows=changed, seeds=[0, 1]))
    assert len(fits.seen) == 9
    assert fits.measured == ["weight", "weight"]


def test_an_interrupted_run_is_done_again_from_its_beginning(place, fits, monkeypatch):
    def interrupted(options, output):
        (options.parent / "half").write_text("of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare.compare(write())
    monkeypatch.setattr(compare, "fit", fits)
    table, failed = compare.compare(write())
    assert failed == []
    assert fits.seen == ["weight/0", "true-target/0"]
    assert not list(Path("out").rglob("half"))
    assert "not run" not in table


def test_a_failing_row_is_reported_and_tried_again(place, fits, capsys):
    fits.broken = {"weight": (1, "stage 1/2\n\nlitbinq fit: error: model.foo: got | and *\n")}
    assert cli.main(["compare", "--config", write()]) == 1
    shown = capsys.readouterr()
    assert "no result for 'weight'" in shown.err.strip().splitlines()[-1]
    rows = lines_of(shown.out)
    assert rows["weight"] == ["failed", *[""] * 6]
    assert rows["true target"][2] == "100.00 (4.00)"  # the others still run, and measure full precision
    assert "weight, seed 0, failed: model.foo: got | and *" in shown.out
    table = json.loads(Path("out/table.json").read_text())
    assert table["rows"][0]["state"] == "failed"
    assert cli.main(["compare", "--config", "compare.yaml", "--only", "true target"]) == 0
    assert lines_of(capsys.readouterr().out)["weight"][0] == "failed"
    fits.broken = {}
    assert cli.main(["compare", "--config", "compare.yaml"]) == 0
    assert fits.seen == ["weight/0", "true-target/0", "weight/0"]
    assert "failed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "said", "words"),
    [
        (1, "ValueError: bad\n", "ValueError: bad"),
        (2, "litbinq fit: error: unknown option\n", "unknown option"),
        (-9, "stage 3/30 block 2\n", "ended by signal 9, out of memory? after: stage 3/30 block 2"),
        (-15, "", "ended by signal 15 after: it said nothing"),
        (0, "done\n", "no results were written after: done"),
    ],
)
def test_the_reason_of_a_failure(code, said, words, place, fits):
    fits.broken = {"weight": (code, said)}
    table, failed = compare.compare(write())
    assert failed == ["weight"]
    assert f"weight, seed 0, failed: {words}\n" in table


def test_only_some_rows(place, fits, capsys):
    assert cli.main(["compare", "--config", write(), "--only", "true target"]) == 0
    rows = lines_of(capsys.readouterr().out)
    assert rows["weight"][0] == "not run"
    assert fits.seen == ["true-target/0"]
    assert cli.main(["compare", "--config", "compare.yaml", "--only", "true"]) == 1
    assert "no row 'true'" in capsys.readouterr().err


def test_seeds_are_shown_as_mean_and_spread(place, fits, caplog):
    caplog.set_level("INFO", "lit_binq")
    table, _ = compare.compare(write(seeds=[0, 1, 2]))
    assert fits.measured == ["weight"]
    row = lines_of(table)["true target"]
    assert row[2:5] == ["110.00 (4.40) [100.00 to 120.00]", "1,100 (27.5) [1,000 to 1,200]", "36"]
    assert "[least to greatest]" in table
    lines = [r.message for r in caplog.records]
    assert lines[1].startswith("1/6 weight, seed 0: 1.046 bits, wiki 200.00 (8.00), c4 2,000 (50.0), 35 s")
    fits.broken = {"true-target": (1, "boom")}
    shutil.rmtree("out/true-target/seed-2")
    table, failed = compare.compare("compare.yaml")
    assert failed == ["true target"]
    assert lines_of(table)["true target (2 of 3 seeds)"][2] == "105.00 (4.20) [100.00 to 110.00]"


def test_bits_of_inputs_have_columns_where_any_row_quantizes_them(place, fits, monkeypatch):
    def quantized(options: Path, output: Path) -> int:
        code = fits(options, output)
        path = Path(yaml.safe_load(options.read_text())["results"])
        more = {"activation_bits": 4.67, "kv_bits": 4} if options.parent.parent.name == "weight" else {}
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
        return code

    monkeypatch.setattr(compare, "fit", quantized)
    rows = lines_of(compare.compare(write())[0])
    assert rows["method"][:4] == ["true bits", "file bits", "input bits", "KV bits"]
    assert rows["weight"][2:4] == ["4.67", "4.00"]
    assert rows["true target"][2:4] == ["16.00", "16.00"]


def test_keep_false_leaves_results_and_logs_only(place, fits):
    fits.broken = {"weight": (1, "boom")}
    compare.compare(write(keep=False))
    left = sorted(p.name for p in Path("out/true-target/seed-0").iterdir())
    assert left == ["fit.log", "fit.yaml", "results.json", "run.json"]
    assert Path("out/weight/seed-0/checkpoint").is_dir()


def test_a_folder_with_other_files_is_left_alone(place, fits, capsys):
    mine = Path("out/true-target/seed-0/notes.txt")
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert cli.main(["compare", "--config", write()]) == 1
    assert "holds files that are not of a comparison" in capsys.readouterr().err
    assert fits.seen == []
    assert mine.read_text() == "mine"


def test_infinite_perplexities_stay_infinite(place, fits, monkeypatch):
    """JSON has no word for them: the files say null, the table says inf, also when it is made again."""

    def diverged(options: Path, output: Path) -> int:
        code = fits(options, output)
        path = options.parent / "results.json"
        results = json.loads(path.read_text())
        results["perplexity"]["wiki"]["packed"] = math.inf
        write_json(path, results)
        return code

    monkeypatch.setattr(compare, "fit", diverged)
    first, failed = compare.compare(write())
    assert not failed
    assert lines_of(first)["weight"][2].startswith("inf")
    seen = list(fits.seen)
    assert compare.compare(write())[0] == first
    assert fits.seen == seen
    for path in Path("out").rglob("*.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)


def test_no_full_precision_no_ratio(place, fits):
    table, _ = compare.compare(write(common={"model.compare_fp": False}))
    assert fits.measured == []
    rows = lines_of(table)
    assert "full precision" not in rows
    assert rows["weight"][2:4] == ["200.00", "2,000"]


def test_rows_with_other_data_say_so(place, fits):
    Path("other.txt").write_text("x")
    rows = ROWS | {"other": {"data.evaluation.wiki.path": "other.txt"}}
    table, _ = compare.compare(write(rows=rows))
    assert fits.measured == ["weight", "other"]
    names = lines_of(table)
    assert {"full precision (weight, true target)", "full precision (other)"} <= names.keys()


# ---- the table ----------------------------------------------------------------------------------------------------


def test_numbers_as_text():
    assert [compare_table.perplexity_text(x) for x in (1, 999.99, 999.996, 6784320.4, math.inf, math.nan)] == [
        "1.00",
        "999.99",
        "1,000",
        "6,784,320",
        "inf",
        "nan",
    ]
    assert [compare_table.ratio_text(x) for x in (1, 9.99, 9.996, 99.96, 272237.6)] == [
        "1.00",
        "9.99",
        "10.0",
        "100",
        "272,238",
    ]


def test_names_cannot_break_the_table(place, fits):
    table, _ = compare.compare(write(rows={"a | b\nc": {}}))
    assert table.splitlines()[3].startswith("| a \\| b c | 1.046 |")


# ---- with real fits -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_fits(place, tokenizer, text_file, capsys):
    """Two methods and one that cannot work, each a process; then the same command again."""
    tiny_model("llama", tied=False).save_pretrained("model")
    tokenizer.save_pretrained("model")
    text = {"path": str(text_file)}
    base = {
        "model": {"model": "model", "tuning": {"epochs": 0}},
        "data": {"train": text, "window_length": 48, "windows": 12, "evaluation": {"text": text}}
        | {"eval_windows": 4, "eval_length": 48},
        "trainer": {"accelerator": "cpu", "devices": 1},
    }
    Path("base.yaml").write_text(yaml.safe_dump(base))
    solver = {"class_path": "lit_binq.solvers.RowColumnSolver", "init_args": {"rounds": 1}}
    rows = {
        "unknown": {"model.closed_form.objectiv": "weight"},
        "weight": {"model.closed_form.objective": "weight"},
        "one round": {"model.closed_form.solver": solver},
    }
    assert cli.main(["compare", "--config", write(rows=rows)]) == 1
    shown = capsys.readouterr()
    assert "no result for 'unknown'" in shown.err
    assert "unknown, seed 0, failed: " in shown.out
    assert "objectiv" in shown.out
    results = json.loads(Path("out/one-round/seed-0/results.json").read_text())
    full = json.loads(Path("out/weight/seed-0/results.json").read_text())["perplexity"]["text"]["fp"]
    ratio = compare_table.ratio_text(results["perplexity"]["text"]["packed"] / full)
    cells = lines_of(shown.out)["one round"]
    assert cells[0] == f"{results['true_bits']:.3f}"
    assert cells[2].endswith(f"({ratio})")
    assert results["perplexity"]["text"].keys() == {"packed"}
    assert results["versions"]["torch"] == torch.__version__
    assert results["calibration_peak_memory"]["host_bytes"] > 10**8
    assert float(cells[4]) > 0
    logs = {p: (p.stat().st_mtime_ns, p.read_text()) for p in Path("out").glob("[wo]*/*/fit.log")}
    assert len(logs) == 2
    assert cli.main(["compare", "--config", write(rows={k: rows[k] for k in ("weight", "one round")})]) == 0
    assert {p: (p.stat().st_mtime_ns, p.read_text()) for p in Path("out").glob("[wo]*/*/fit.log")} == logs
