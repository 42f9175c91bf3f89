"""Fits with every solver, and with a bit budget: what is stored, what it counts, what a checkpoint gives back."""

import inspect
import re

import pytest
import torch

from fitting import KeepEach, Remember, assert_same, fit, stored
from lit_binq import solvers
from lit_binq.calibration.options import BlockTuning, ClosedForm, ModelTuning
from lit_binq.errors import LitBinqError
from lit_binq.formats import PlanesLinear
from lit_binq.formats.manifest import read_manifest
from lit_binq.formats.registry import packed_linears
from lit_binq.hub.bits import true_bits
from lit_binq.hub.save_load import load_packed
from lit_binq.solvers import GroupedSolver, LowRankSolver, OutputAlignment, PlanesSolver, Solver

SOLVERS = [
    found
    for name in solvers.__all__
    if inspect.isclass(found := getattr(solvers, name)) and issubclass(found, Solver) and not inspect.isabstract(found)
]
OFF, NO_MODEL_STAGE = BlockTuning(epochs=0), ModelTuning(epochs=0)


def counted_bits(folder) -> float:
    """Bits of every stored tensor of a packed layer but its bias, or its counted ones, a weight: from the files."""
    manifest, tensors = read_manifest(folder), stored(folder)
    layers = {name: [] for name, entry in manifest["linears"].items() if "counted_bits" not in entry}
    counted = sum(entry.get("counted_bits", 0) for entry in manifest["linears"].values())
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if layer in layers and part != "bias":
            layers[layer].append(tensor)
    model, _ = load_packed(folder)
    weights = sum(m.in_features * m.out_features for m in packed_linears(model).values())
    return (counted + sum(8 * t.numel() * t.element_size() for parts in layers.values() for t in parts)) / weights


def test_every_exported_solver_is_here():
    assert {s.__name__ for s in SOLVERS} >= {
        "RowColumnSolver",
        "PlanesSolver",
        "GroupedSolver",
        "LowRankSolver",
        "CGB",
    }
    assert len(SOLVERS) >= 10


@pytest.mark.grid(1)
@pytest.mark.parametrize(
    ("solver", "tuned"),
    [*((s, False) for s in SOLVERS), *((s, True) for s in SOLVERS if s.deployable)],
    ids=lambda v: v.__name__ if inspect.isclass(v) else "tuned" if v else "closed form",
)
def test_every_solver_runs_through_a_fit(solver, tuned, make_source, text_file, tmp_path):
    """Biases (qwen2), a block and, where it is tuned, the model stage: what it computes with is what is stored."""
    remember = Remember()
    module = fit(
        make_source("qwen2", blocks=1),
        text_file,
        tmp_path / "packed",
        callbacks=[remember],
        data={"windows": 10},
        closed_form=ClosedForm(solver=solver()),
        tuning=BlockTuning(epochs=int(tuned)),
        end_to_end=ModelTuning(epochs=int(tuned), lr_codes=0.03),
    )
    assert [r.epochs for r in module.records] == [1, 1] * tuned + [0] * (not tuned)
    assert all(r.after <= r.before for r in module.records)
    model, _ = load_packed(tmp_path / "packed")
    assert len(packed_linears(model)) == 7
    with torch.no_grad():
        assert torch.equal(model(input_ids=torch.arange(24).reshape(1, -1)).logits, remember.logits)
    manifest = read_manifest(tmp_path / "packed")
    bits = counted_bits(tmp_path / "packed")
    assert true_bits(model) == pytest.approx(bits, abs=1e-12)
    assert manifest["true_bits"] == pytest.approx(bits, abs=1e-12)


# ---- bit budgets ---------------------------------------------------------------------------------------------------


@pytest.mark.grid(1)
@pytest.mark.parametrize("bits", [2.5, 2.9])
def test_a_budget_is_kept_and_nearly_spent(bits, make_source, text_file, tmp_path):
    remember = Remember()
    form = ClosedForm(solver=PlanesSolver(), bits=bits)
    fit(make_source(), text_file, tmp_path / "packed", closed_form=form, callbacks=[remember])
    model, _ = load_packed(tmp_path / "packed")
    assert bits - 0.05 < counted_bits(tmp_path / "packed") <= bits
    assert counted_bits(tmp_path / "packed") == pytest.approx(true_bits(model), abs=1e-12)
    layers = [m for m in packed_linears(model).values() if isinstance(m, PlanesLinear)]
    assert layers
    assert len({len(m.solution().columns[0]) / m.in_features for m in layers}) > 1  # not simply the same share for each
    with torch.no_grad():
        assert torch.equal(model(input_ids=torch.arange(24).reshape(1, -1)).logits, remember.logits)


def test_a_budget_of_ranks_is_kept(make_source, text_file, tmp_path):
    form = ClosedForm(solver=LowRankSolver(), bits=2.5)
    fit(make_source(), text_file, tmp_path / "packed", closed_form=form, tuning=OFF, end_to_end=NO_MODEL_STAGE)
    assert 1.5 < counted_bits(tmp_path / "packed") <= 2.5


@pytest.mark.grid(1)
@pytest.mark.parametrize(
    ("solver", "stage"),
    [(PlanesSolver(), 1), (PlanesSolver(), 2), (GroupedSolver(group=16), 1), (LowRankSolver(rounds=1), 2)],
    ids=lambda value: type(value).__name__ if isinstance(value, Solver) else str(value),
)
def test_resuming_brings_back_formats_and_layouts(solver, stage, make_source, text_file, tmp_path):
    source, keep = make_source(), KeepEach(str(tmp_path / "kept"))
    form = ClosedForm(solver=solver, bits=2.7 if solver.takes_bits else 0)
    fit(source, text_file, tmp_path / "whole", callbacks=[keep], closed_form=form)
    checkpoint = tmp_path / "kept" / f"stage-{stage}.ckpt"
    fit(source, text_file, tmp_path / "resumed", ckpt_path=checkpoint, closed_form=form)
    assert_same(tmp_path / "whole", tmp_path / "resumed")
    whole, resumed = (read_manifest(tmp_path / name)["linears"] for name in ("whole", "resumed"))
    assert whole == resumed


@pytest.mark.grid(1)
@pytest.mark.parametrize(
    "other",
    [
        ClosedForm(solver=PlanesSolver(), bits=2.6),
        ClosedForm(solver=PlanesSolver()),
        ClosedForm(solver=PlanesSolver(rounds=0), bits=2.7),
        ClosedForm(solver=LowRankSolver(), bits=2.7),
    ],
    ids=["budget", "no budget", "option", "solver"],
)
def test_a_checkpoint_of_another_budget_is_refused(other, make_source, text_file, tmp_path):
    source, off = make_source(blocks=1), {"tuning": OFF, "end_to_end": NO_MODEL_STAGE}
    form = ClosedForm(solver=PlanesSolver(), bits=2.7)
    fit(source, text_file, tmp_path / "one", closed_form=form, **off)
    with pytest.raises(LitBinqError, match="another options") as caught:
        fit(
            source, text_file, tmp_path / "two", closed_form=other, ckpt_path=tmp_path / "one-ckpt" / "last.ckpt", **off
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "two").exists()


def test_a_budget_too_small_for_the_signs_is_one_line_and_leaves_nothing(make_source, text_file, tmp_path):
    form = ClosedForm(solver=PlanesSolver(), bits=1.5)
    with pytest.raises(LitBinqError, match=r"closed_form\.bits: got 1\.5, expected at least 1\.9\d+") as caught:
        fit(make_source(), text_file, tmp_path / "packed", closed_form=form)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["llama-model"]


def test_a_budget_above_what_all_planes_take_is_one_line_and_leaves_nothing(make_source, text_file, tmp_path):
    source, off = make_source(blocks=1), {"tuning": OFF, "end_to_end": NO_MODEL_STAGE}
    with pytest.raises(LitBinqError, match=r"closed_form\.bits: got 9\.0, expected at most \d\.\d+") as caught:
        fit(source, text_file, tmp_path / "packed", closed_form=ClosedForm(solver=PlanesSolver(), bits=9.0), **off)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["llama-model"]
    most = float(re.search(r"at most (\d\.\d+)", str(caught.value))[1])
    form = ClosedForm(solver=PlanesSolver(rounds=0), bits=most)
    fit(source, text_file, tmp_path / "packed", closed_form=form, **off)
    assert most - 1e-4 < counted_bits(tmp_path / "packed") <= most


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"bits": 1.5}, r"closed_form\.bits: got 1\.5 for RowColumnSolver, whose format has a fixed size"),
        ({"bits": 2.0, "solver": GroupedSolver()}, r"closed_form\.bits: got 2\.0 for GroupedSolver"),
        ({"bits": -1.0, "solver": PlanesSolver()}, r"closed_form\.bits: got -1\.0, expected a number >= 0"),
        ({"bits": float("nan"), "solver": PlanesSolver()}, r"closed_form\.bits: got nan"),
        ({"bits": float("inf"), "solver": PlanesSolver()}, r"closed_form\.bits: got inf"),
    ],
)
def test_combinations_that_cannot_work_are_refused(wrong, words):
    with pytest.raises(LitBinqError, match=words) as caught:
        ClosedForm(**wrong)
    assert "\n" not in str(caught.value)


# ---- other options of the closed form ------------------------------------------------------------------------------


def packed_layers(folder):
    return {name: m.dequantize() for name, m in packed_linears(load_packed(folder)[0]).items()}


def test_the_objective_may_be_for_the_last_layer_only(make_source, text_file, tmp_path):
    """The paper's form: every layer but a block's last is the plain fit to its weight, whatever went before it."""
    source, off = make_source(), {"tuning": OFF, "end_to_end": NO_MODEL_STAGE}
    forms = {
        "last": ClosedForm(solver=OutputAlignment(amp=False)),
        "weight": ClosedForm(objective="weight"),
        "all": ClosedForm(),
    }
    for name, form in forms.items():
        fit(source, text_file, tmp_path / name, closed_form=form, **off)
    last, weight, everywhere = (packed_layers(tmp_path / name) for name in forms)
    for name, W in last.items():
        assert torch.equal(W, weight[name]) == (not name.endswith("down_proj")), name
        assert not torch.equal(W, everywhere[name]), name


@pytest.mark.grid(1)
@pytest.mark.parametrize("scope", ["last", "all"])
def test_amp_runs_through_a_fit(scope, make_source, text_file, tmp_path):
    """It changes what is solved, and only where the objective applies."""
    source, off = make_source(), {"tuning": OFF, "end_to_end": NO_MODEL_STAGE}
    for name, amp in (("plain", False), ("gated", True)):
        fit(
            source,
            text_file,
            tmp_path / name,
            closed_form=ClosedForm(solver=OutputAlignment(amp=amp, scope=scope)),
            **off,
        )
    plain, gated = (packed_layers(tmp_path / name) for name in ("plain", "gated"))
    same = {name for name in plain if torch.equal(plain[name], gated[name])}
    if scope == "last":
        assert same == {name for name in plain if not name.endswith("down_proj")}
    else:
        assert not any("layers.1" in name for name in same)
