"""`litbinq compare`: options that are merged, and the plans made of them."""

import json
import textwrap
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from comparing import BASE, write
from lit_binq.calibration.module import BinQCalibration
from lit_binq.cli import main as cli
from lit_binq.compare.plan import expand, folder_name, load_yaml, merge, read_plan
from lit_binq.data.module import CalibrationData
from lit_binq.errors import LitBinqError

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


@pytest.mark.slow
def test_plans_in_the_repository_can_be_read(monkeypatch):
    monkeypatch.chdir(ROOT)
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


def test_the_start_from_the_weights_is_the_row_that_was_measured(monkeypatch):
    """configs/from-the-weights.yaml on top of a protocol is the row of the comparison."""
    monkeypatch.chdir(ROOT)
    on_top = yaml.safe_load(Path("configs/from-the-weights.yaml").read_text())
    for protocol in ("s", "l"):
        rows = yaml.safe_load(Path(f"configs/compare-further-{protocol}.yaml").read_text())["rows"]
        row: dict[str, dict[str, dict[str, object]]] = {}
        for name, value in rows["both, from the weights"].items():
            model, part, option = name.split(".")
            row.setdefault(model, {}).setdefault(part, {})[option] = value
        assert on_top == row
