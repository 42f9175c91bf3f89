"""`litbinq compare`: plans, what is run and what is not, the table; one comparison with real fits."""

import json
import math
import shutil
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from lit_binq import cli, compare, compare_table
from lit_binq.calibration import BinQCalibration
from lit_binq.compare_plan import expand, folder_name, load_yaml, merge, read_plan
from lit_binq.data import CalibrationData
from lit_binq.errors import LitBinqError
from lit_binq.memory import host_peak, peak_memory, reset_peak_memory

BASE = {
    "model": {"model": "model.gguf", "packed": "p", "closed_form": {"objective": "true_target", "shrinkage": 0.1}},
    "data": {"train": {"path": "train.txt"}, "evaluation": {"wiki": {"path": "wiki.txt"}, "c4": {"path": "c4.txt"}}},
    "checkpoint": {"dirpath": "c"},
    "results": "r.json",
    "ckpt_path": "left/over.ckpt",
}
ROWS = {
    "weight": {"model.closed_form.objective": "weight"},
    "true target": {"model": {"closed_form": {"shrinkage": 0.3}}},
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder that commands run in, with a base file and the texts it names."""
    monkeypatch.chdir(tmp_path)
    for name in ("train.txt", "wiki.txt", "c4.txt", "model.gguf"):
        Path(name).write_text(name)
    Path("base.yaml").write_text(yaml.safe_dump(BASE, sort_keys=False))
    return tmp_path


def write(**keys) -> str:
    """A comparison's YAML file."""
    given = {"base": "base.yaml", "out": "out", "rows": ROWS} | keys
    Path("compare.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    return "compare.yaml"


class Fits:
    """Stands in for `litbinq fit`: perplexity 100 + 10 x seed, twice that for the row `weight`; c4 ten times."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.measured: list[str] = []
        self.broken: dict[str, tuple[int, str]] = {}

    def __call__(self, options: Path, output: Path) -> int:
        given = yaml.safe_load(options.read_text())
        row = options.parent.parent.name
        self.seen.append(f"{row}/{given['seed_everything']}")
        for name in ("packed", "checkpoint"):
            (options.parent / name).mkdir()
        if row in self.broken:
            code, said = self.broken[row]
            output.write_text(said)
            return code
        output.write_text("wrote it\n")
        packed = (100 + 10 * given["model"]["seed"]) * (2 if row == "weight" else 1)
        perplexity = {"wiki": {"packed": packed}, "c4": {"packed": 10 * packed}}
        if given["model"]["compare_fp"]:
            self.measured.append(row)
            for name, value in (("wiki", 25.0), ("c4", 40.0)):
                perplexity[name]["fp"] = value
        results = {
            "model": given["model"]["model"],
            "true_bits": 1.046,
            "file_bits": 4.41,
            "perplexity": perplexity,
            "data": "calibration: train.txt; fingerprint 1\nevaluation: wiki.txt",
            "calibration_tokens": 124928,
            "calibration_seconds": 35.0 + given["model"]["seed"],
            "calibration_peak_memory": {"host_bytes": 3_900_000_000, "device_bytes": None},
            "device": "a device",
            "versions": {"torch": "2.13.0"},
        }
        Path(given["results"]).write_text(json.dumps(results))
        return 0


@pytest.fixture
def fits(monkeypatch):
    stand_in = Fits()
    monkeypatch.setattr(compare, "fit", stand_in)
    return stand_in


def lines_of(table: str) -> dict[str, list[str]]:
    """Cells by the row's name."""
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1
    return {row[0]: row[1:] for row in rows}


# ---- options ------------------------------------------------------------------------------------------------------


def test_dotted_and_nested_keys_are_the_same_options():
    dotted = {"a.b.c": 1, "a": {"b.d": 2}, "a.e": [3]}
    assert expand(dotted, "here") == {"a": {"b": {"c": 1, "d": 2}, "e": [3]}}
    # Names of corpora are no options.
    assert expand({"data.evaluation": {"c4.en": {"path": "x"}}}, "here") == {
        "data": {"evaluation": {"c4.en": {"path": "x"}}}
    }


@pytest.mark.parametrize(
    "given", [{"a.b": 1, "a": {"b": 2}}, {"a": 1, "a.b": 2}, {"a.b": 1, "a": 2}, {"a..b": 1}, {"a.": 1}, {1: 2}]
)
def test_options_given_twice_or_not_by_name_are_refused(given):
    with pytest.raises(LitBinqError, match="here"):
        expand(given, "here")


TREES = st.recursive(
    st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3), max_leaves=8
).filter(lambda tree: isinstance(tree, dict))


def leaves(tree, above=()):
    for key, value in tree.items():
        yield from leaves(value, (*above, key)) if isinstance(value, dict) else [(".".join((*above, key)), value)]


@given(TREES, TREES)
def test_merging_keeps_every_option_of_the_upper_and_no_other_of_its_own(under, over):
    before = json.dumps([under, over])
    merged = dict(leaves(merge(under, over)))
    assert json.dumps([under, over]) == before
    upper, lower = dict(leaves(over)), dict(leaves(under))
    assert upper.items() <= merged.items()
    assert merged.items() <= (lower | upper).items()
    assert merge(under, under) == under
    assert expand(upper, "here") == over


def test_a_class_path_replaces_the_class_with_its_arguments():
    base = {"solver": {"class_path": "A", "init_args": {"x": 1, "y": 2}}}
    assert merge(base, {"solver": {"class_path": "B"}}) == {"solver": {"class_path": "B"}}
    assert merge(base, {"solver": {"init_args": {"x": 3}}})["solver"]["init_args"] == {"x": 3, "y": 2}


def test_yaml_takes_exponents_for_numbers_and_refuses_a_row_twice(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: [1e-3, -2E+4, 1.5e2, 1e, '1e-3']")
    assert load_yaml(path) == {"a": [1e-3, -2e4, 150.0, "1e", "1e-3"]}
    path.write_text("rows:\n  one: {}\n  one: {}\n")
    with pytest.raises(LitBinqError, match="line 2: key 'one' is given twice"):
        load_yaml(path)


@given(st.text())
def test_a_row_s_folder_is_one_plain_name(name):
    folder = folder_name(name)
    assert folder == folder_name(folder)
    assert not set(folder) & set('/\\. \n:*?"<>|')
    assert not folder.startswith("-")


# ---- plans --------------------------------------------------------------------------------------------------------


def test_a_plan_merges_base_common_row_and_seed(place):
    plan = read_plan(Path(write(common={"trainer.devices": 1, "model.closed_form.shrinkage": 0.2}, seeds=[0, 3])))
    assert [(r.row, r.seed, str(r.folder)) for r in plan.runs] == [
        ("weight", 0, "out/weight/seed-0"),
        ("weight", 3, "out/weight/seed-3"),
        ("true target", 0, "out/true-target/seed-0"),
        ("true target", 3, "out/true-target/seed-3"),
    ]
    options = plan.runs[3].options
    assert options["model"]["closed_form"] == {"objective": "true_target", "shrinkage": 0.3}
    assert (options["seed_everything"], options["model"]["seed"], options["trainer"]) == (3, 3, {"devices": 1})
    assert "ckpt_path" not in options
    assert len({r.digest for r in plan.runs}) == 4
    assert len({r.fp_digest for r in plan.runs}) == 1
    assert plan.corpora == ["wiki", "c4"]


def test_what_a_run_depends_on_changes_its_digest_and_nothing_else_does(place):
    def digests():
        return [(r.digest, r.fp_digest) for r in read_plan(Path("compare.yaml")).runs]

    write()
    first = digests()
    write(out="elsewhere", keep=False, references=[{"name": "n", "source": "s"}])
    Path("base.yaml").write_text("# a comment\n" + yaml.safe_dump(BASE | {"results": "other.json"}, sort_keys=False))
    assert digests() == first
    Path("train.txt").write_text("other calibration text")
    second = digests()
    assert all(a[0] != b[0] and a[1] == b[1] for a, b in zip(first, second, strict=True))
    Path("c4.txt").write_text("other evaluation text")
    third = digests()
    assert all(a[0] != b[0] and a[1] != b[1] for a, b in zip(second, third, strict=True))
    write(common={"model.compare_fp": False})
    assert {fp for _, fp in digests()} == {None}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"row": {}}, ["unknown key 'row'", "rows"]),
        ({"base": "nowhere.yaml"}, ["nowhere.yaml", "cannot be read"]),
        ({"base": None}, ["base: got None", "expected a path"]),
        ({"rows": {}}, ["rows: got none"]),
        ({"rows": ["weight"]}, ["rows", "expected a mapping"]),
        ({"rows": {True: {}}}, ["rows", "text for keys"]),
        ({"rows": {"a b": {}, "A-B": {}}}, ["'A-B'", "'a b'"]),
        ({"rows": {"?!": {}}}, ["'?!'", "letters"]),
        ({"rows": {"x": {"model.packed": "here"}}}, ["rows: x", "model.packed", "every row has its own"]),
        ({"rows": {"x": {"seed_everything": 1}}}, ["rows: x", "seed_everything", "`seeds`"]),
        ({"rows": {"x": {"model": {"seed": None}}}}, ["rows: x", "model.seed", "`seeds`"]),
        ({"rows": {"x": {"a.b": 1, "a": {"b": 1}}}}, ["rows: x", "a.b", "given twice"]),
        ({"common": {"ckpt_path": "x"}}, ["common", "ckpt_path"]),
        ({"common": {"evaluate": False}}, ["common", "evaluate"]),
        ({"seeds": []}, ["seeds: got []"]),
        ({"seeds": [1, 1]}, ["seeds: got [1, 1]", "different"]),
        ({"seeds": [True]}, ["seeds: got [True]"]),
        ({"seeds": 3}, ["seeds: got 3"]),
        ({"keep": "no"}, ["keep: got 'no'"]),
        ({"references": {"name": "x"}}, ["references", "expected a list"]),
        ({"references": [{"name": "x"}]}, ["references: source: got None"]),
        ({"references": [{"name": "x", "source": "y", "ppl": 1}]}, ["unknown key 'ppl'", "perplexity"]),
        ({"references": [{"name": "x", "source": "y", "ratio": {"wikitext": 1}}]}, ["'wikitext'", "wiki, c4"]),
        ({"references": [{"name": "x", "source": "y", "true_bits": "few"}]}, ["got 'few'", "a number"]),
    ],
)
def test_bad_plans_are_one_line_and_run_nothing(keys, words, place, fits, capsys):
    assert cli.main(["compare", "--config", write(**keys)]) == 1
    line = capsys.readouterr().err.strip()
    assert line.startswith("litbinq compare: error: ")
    assert len(line.splitlines()) == 1
    assert [w for w in words if w not in line] == []
    assert fits.seen == []
    assert not Path("out").exists()


def test_the_help_text_is_a_plan(place, capsys):
    """The example in `litbinq compare --help` can be run as it stands, but for its paths."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    example = textwrap.dedent(shown[shown.index("    base: ") : shown.index("Options are merged")])
    Path("compare.yaml").write_text(example.replace("configs/smollm2-135m-s.yaml", "base.yaml"))
    Path("base.yaml").write_text(yaml.safe_dump(BASE | {"data": {}}))
    plan = read_plan(Path("compare.yaml"))
    assert len(plan.runs) == 6
    assert not plan.keep
    assert plan.corpora == ["wikitext2"]


def fit_accepts(options: dict) -> None:
    """Build what `litbinq fit` builds from the options of the model and the data; neither loads anything yet."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(BinQCalibration, "model")
    parser.add_class_arguments(CalibrationData, "data")
    data = options["data"] | {"tokenizer": options["model"]["model"]}
    # Older releases of jsonargparse have the longer name only.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    instantiate(parser.parse_object({"model": options["model"], "data": data}))


def test_plans_in_the_repository_can_be_read(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    paths = sorted(Path("configs").glob("compare-*.yaml"))
    assert len(paths) >= 3
    for path in paths:
        plan = read_plan(path)
        assert path.read_text().startswith(f"# litbinq compare --config {path}\n")
        for run in plan.runs:
            fit_accepts(run.options)
            assert run.options["data"]["eval_windows"] == 64
    outs = [read_plan(path).out for path in paths]
    assert len(set(outs)) == len(outs)


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
        (2, "litbinq: error: unknown option\n", "unknown option"),
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
    assert compare_table.finite({"a": [math.inf, 1.0], "b": math.nan}) == {"a": [None, 1.0], "b": None}


def test_names_cannot_break_the_table(place, fits):
    table, _ = compare.compare(write(rows={"a | b\nc": {}}))
    assert table.splitlines()[3].startswith("| a \\| b c | 1.046 |")


# ---- memory -------------------------------------------------------------------------------------------------------


def test_peak_memory_counts_what_was_held_at_once():
    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    before = peak_memory(cpu)["host_bytes"]
    assert before is not None
    grow = max(0, before - resident_now()) + 2**27
    block = torch.ones(grow // 4)
    after = peak_memory(cpu)
    assert 0.9 * 2**27 <= after["host_bytes"] - before <= 2**28
    assert after["device_bytes"] is None
    del block
    # A peak stays; the kernel's counters of several threads are a few pages apart.
    assert peak_memory(cpu)["host_bytes"] >= after["host_bytes"] - 2**22


def resident_now() -> int:
    """Bytes resident now, or a guess that is too low."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)


def test_peak_memory_where_the_kernel_gives_no_account(tmp_path):
    resource = pytest.importorskip("resource")
    unit = 1 if sys.platform == "darwin" else 1024
    for text in (None, "Name:\tpython\n"):
        status = tmp_path / "status"
        if text is not None:
            status.write_text(text)
        assert host_peak(status) == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    status.write_text("VmPeak:\t 9 kB\nVmHWM:\t   2012 kB\n")
    assert host_peak(status) == 2012 * 1024


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_of_a_device():
    device = torch.device("cuda")
    reset_peak_memory(device)
    before = peak_memory(device)["device_bytes"]
    torch.ones(2**20, device=device)
    assert peak_memory(device)["device_bytes"] - before == 2**22


# ---- with real fits -----------------------------------------------------------------------------------------------


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
