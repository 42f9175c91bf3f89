"""The whole calibration on tiny models: one fit, resumed, on two processes, and with input that cannot work."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
from conftest import tiny_model
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from fitting import KeepEach, Remember, T, assert_same, fit, make_data, make_trainer, stored, two_processes
from lit_binq.calibration.block_stage import BlockStage
from lit_binq.calibration.checkpoint import fingerprint
from lit_binq.calibration.module import BinQCalibration
from lit_binq.calibration.options import BlockTuning, ClosedForm, ModelTuning
from lit_binq.calibration.trainer_checks import refuse_sharding
from lit_binq.diagnostics.measure import DiagnosticsOptions
from lit_binq.errors import LitBinqError
from lit_binq.formats import LatentBinaryLinear, PackedLinear, Solution
from lit_binq.formats.manifest import read_manifest
from lit_binq.formats.registry import packed_linears
from lit_binq.hub.bits import true_bits
from lit_binq.hub.save_load import load_packed
from lit_binq.solvers import (
    ARBX,
    CGB,
    PBLLM,
    GroupedSolver,
    LowRankSolver,
    PlanesSolver,
    Problem,
    RowColumnSolver,
    Solver,
)
from lit_binq.utils.json_records import read_diagnostics


def test_one_fit_gives_a_packed_model_that_reloads_bit_for_bit(any_model, tokenizer, text_file, tmp_path):
    source = tmp_path / "model"
    any_model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    remember = Remember()
    module = fit(source, text_file, tmp_path / "packed", callbacks=[remember])
    assert [r.title for r in module.records] == ["block 0", "block 1", "model"]
    model, _ = load_packed(tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(model(input_ids=torch.arange(24).reshape(1, -1)).logits, remember.logits)
    linears = sum(isinstance(m, torch.nn.Linear) for m in any_model.modules()) - 1  # all but the head
    assert len(packed_linears(model)) == linears
    tensors = stored(tmp_path / "packed")
    parts = ("codes", "row_scale", "col_scale")
    bits = sum(8 * t.numel() * t.element_size() for n, t in tensors.items() if n.endswith(parts))
    weights = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, PackedLinear))
    assert true_bits(model) == pytest.approx(bits / weights, abs=1e-12)
    facts = read_manifest(tmp_path / "packed")["facts"]
    assert facts["calibration_tokens"] == 16 * T
    assert len(facts["stages"]) == 3


def test_tuning_lowers_the_held_out_loss(make_source, text_file, tmp_path):
    tuning = BlockTuning(epochs=12, lr_codes=0.03)
    module = fit(make_source(), text_file, tmp_path / "packed", tuning=tuning)
    assert all(r.after <= r.before for r in module.records)
    assert sum(r.after < r.before for r in module.records) >= 2


def test_a_stage_keeps_at_least_the_closed_form(make_source, text_file, tmp_path):
    source = make_source()
    wild = BlockTuning(epochs=2, lr_codes=5.0, lr_scales=3.0, lr_norms=3.0)
    module = fit(source, text_file, tmp_path / "wild", tuning=wild, end_to_end=ModelTuning(epochs=0))
    fit(source, text_file, tmp_path / "closed", tuning=BlockTuning(epochs=0), end_to_end=ModelTuning(epochs=0))
    assert [(r.best_epoch, r.epochs) for r in module.records] == [(0, 2), (0, 2)]
    assert_same(tmp_path / "wild", tmp_path / "closed")


@pytest.mark.grid(1)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resuming_at_a_stage_boundary_gives_the_same_bits(stage, make_source, text_file, tmp_path):
    source = make_source("opt")  # dropout, biases and LayerNorm
    keep = KeepEach(str(tmp_path / "kept"))
    fit(source, text_file, tmp_path / "whole", callbacks=[keep])
    resumed = fit(source, text_file, tmp_path / "resumed", ckpt_path=tmp_path / "kept" / f"stage-{stage}.ckpt")
    assert [r.stage for r in resumed.records] == [0, 1, 2]
    assert_same(tmp_path / "whole", tmp_path / "resumed")


class SaveAmidst(pl.Callback):
    """Saves a checkpoint behind some step of the model stage, as a callback of the user's may."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, module: BinQCalibration) -> None:
        if module.stage_index == 2 and not self.path.exists():
            trainer.save_checkpoint(self.path)


def test_a_checkpoint_amidst_the_model_stage_begins_the_stage_again(make_source, text_file, tmp_path):
    """The stage tunes norms where they stand: what was finished before must not follow them."""
    source, amidst = make_source(), tmp_path / "amidst.ckpt"
    end_to_end = ModelTuning(epochs=3, lr_codes=0.02, lr_norms=0.1, lr_embeddings=0.1)
    fit(source, text_file, tmp_path / "whole", end_to_end=end_to_end, callbacks=[SaveAmidst(amidst)])
    fit(source, text_file, tmp_path / "again", end_to_end=end_to_end, ckpt_path=amidst)
    assert_same(tmp_path / "whole", tmp_path / "again")


def test_a_checkpoint_of_another_run_is_refused(make_source, text_file, tmp_path):
    source = make_source()
    fit(source, text_file, tmp_path / "one")
    last = tmp_path / "one-ckpt" / "last.ckpt"
    with pytest.raises(LitBinqError, match="another options"):
        fit(source, text_file, tmp_path / "two", ckpt_path=last, closed_form=ClosedForm(shrinkage=0.3))
    with pytest.raises(LitBinqError, match="another data"):
        fit(source, text_file, tmp_path / "two", ckpt_path=last, data={"windows": 16})
    tiny_model("llama", seed=5).save_pretrained(source)
    with pytest.raises(LitBinqError, match="another model"):
        fit(source, text_file, tmp_path / "two", ckpt_path=last)
    assert not (tmp_path / "two").exists()


def test_without_held_out_windows_the_training_loss_decides(make_source, text_file, tmp_path):
    module = fit(make_source(), text_file, tmp_path / "packed", data={"held_out": 0.0})
    assert len(module.records) == 3


def test_the_disk_cache_gives_the_same_bits(make_source, text_file, tmp_path):
    from lit_binq.calibration.streams import StreamOptions

    source = make_source("qwen2")
    fit(source, text_file, tmp_path / "host")
    disk = StreamOptions(cache="disk", cache_dir=str(tmp_path), batch_windows=8)
    fit(source, text_file, tmp_path / "disk", streams=disk)
    assert_same(tmp_path / "host", tmp_path / "disk")
    assert not list(tmp_path.glob("litbinq-streams-*"))


def test_two_processes_hold_identical_codes(make_source, text_file, tmp_path):
    source = make_source()
    closed = {"tuning": BlockTuning(epochs=0), "end_to_end": ModelTuning(epochs=0)}
    for name, options in (("closed", closed), ("tuned", {})):
        folder = tmp_path / name
        folder.mkdir()
        fit(
            source,
            text_file,
            tmp_path / f"two-{name}",
            callbacks=[Remember(folder)],
            trainer=two_processes(),
            **options,
        )
        assert (folder / "rank-0").read_text() == (folder / "rank-1").read_text()
    # Statistics are summed over ranks: the closed form is the one of a single process, but for rounding.
    fit(source, text_file, tmp_path / "one", data={"windows": 20}, **closed)
    one, both = load_packed(tmp_path / "one")[0], load_packed(tmp_path / "two-closed")[0]
    pairs = zip(packed_linears(one).values(), packed_linears(both).values(), strict=True)
    same = [float((a.solution().B == b.solution().B).float().mean()) for a, b in pairs]
    assert min(same) > 0.97


@dataclass
class Drifting(Solver):
    """A solver whose second process sees other numbers, as another library's rounding would make them, only more."""

    takes_bits: ClassVar[bool] = True
    inner: Solver = field(default_factory=PlanesSolver)

    @staticmethod
    def drift(t: Tensor) -> Tensor:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        noise = torch.randn(t.shape, generator=torch.Generator().manual_seed(1))
        return t + 0.3 * rank * t.abs().mean() * noise.to(t)

    def solve(self, problem: Problem) -> Solution:
        return self.inner.solve(replace(problem, T=self.drift(problem.T)))

    def allocate_bits(self, weights: dict[str, Tensor], moments: dict[str, Tensor], bits: float) -> dict[str, float]:
        return self.inner.allocate_bits({k: self.drift(W) for k, W in weights.items()}, moments, bits)


@pytest.mark.grid(1)
@pytest.mark.parametrize(
    ("form", "epochs"),
    [
        (ClosedForm(solver=Drifting(PlanesSolver()), bits=2.6), 0),
        (ClosedForm(solver=Drifting(PlanesSolver()), bits=2.6), 1),
        (ClosedForm(solver=Drifting(LowRankSolver(rounds=1)), bits=2.6), 0),
        (ClosedForm(solver=Drifting(CGB()), objective="weight"), 0),
        (ClosedForm(solver=Drifting(PBLLM())), 0),
        *((ClosedForm(solver=Drifting(s)), 0) for s in (RowColumnSolver(), GroupedSolver(), ARBX())),
    ],
    ids=lambda v: str(v) if isinstance(v, int) else type(v.solver.inner).__name__,
)
def test_the_first_process_is_right_about_every_format(form, epochs, make_source, text_file, tmp_path):
    """Diagnostics, which only the first one takes, keep nobody waiting."""
    options = {
        "tuning": BlockTuning(epochs=epochs),
        "end_to_end": ModelTuning(epochs=0),
        "diagnostics": DiagnosticsOptions(windows=1),
    }
    data, remember = {"windows": 10, "batch_size": 2}, Remember(tmp_path)
    source = make_source(blocks=1)
    fit(source, text_file, tmp_path / "packed", closed_form=form, trainer=two_processes(), callbacks=[remember],
        data=data, **options)  # fmt: skip
    assert (tmp_path / "rank-0").read_text() == (tmp_path / "rank-1").read_text()
    bits = true_bits(load_packed(tmp_path / "packed")[0])
    assert bits <= (form.bits or 8)
    assert len(read_diagnostics(tmp_path / "diagnostics.json")) == 1


def test_the_epoch_before_tuning_is_the_same_on_both_processes(make_source, text_file, tmp_path, monkeypatch):
    """Latents that differ before DDP wraps them, and a tuning so wild that none of its epochs is kept."""
    groups = BlockStage.parameter_groups

    @torch.no_grad()
    def drifting(stage):
        for p in stage.module.parameters():
            p.mul_(1 + 0.01 * torch.distributed.get_rank())
        return groups(stage)

    monkeypatch.setattr(BlockStage, "parameter_groups", drifting)
    wild = BlockTuning(epochs=1, lr_codes=5.0, lr_scales=3.0, lr_norms=3.0)
    module = fit(make_source(blocks=1), text_file, tmp_path / "packed", callbacks=[Remember(tmp_path)], tuning=wild,
                 end_to_end=ModelTuning(epochs=0), trainer=two_processes())  # fmt: skip
    assert read_manifest(module.packed)["facts"]["stages"][0]["best_epoch"] == 0
    assert (tmp_path / "rank-0").read_text() == (tmp_path / "rank-1").read_text()


@pytest.mark.parametrize("stage", ["tuning", "end_to_end"])
def test_the_first_process_is_right_about_what_tuning_packs(stage, make_source, text_file, tmp_path, monkeypatch):
    """Latents that are the same everywhere, packed by a device that rounds otherwise, only more; norms as well."""
    pack = LatentBinaryLinear.pack

    @torch.no_grad()
    def drifting(layer):
        layer.v.mul_(1 - 2 * torch.distributed.get_rank())
        return pack(layer)

    monkeypatch.setattr(LatentBinaryLinear, "pack", drifting)
    options = {"tuning": BlockTuning(), "end_to_end": ModelTuning()} | {
        stage: (BlockTuning if stage == "tuning" else ModelTuning)(epochs=1)
    }
    fit(make_source(blocks=1), text_file, tmp_path / "packed", callbacks=[Remember(tmp_path)], trainer=two_processes(),
        **options)  # fmt: skip
    assert (tmp_path / "rank-0").read_text() == (tmp_path / "rank-1").read_text()


def test_a_model_that_shares_the_beginning_of_every_tensor_is_another(make_source, text_file, tmp_path, make_model):
    """A fine-tune may leave rows alone: 256 values of each are not the model."""
    source = make_source(blocks=1)
    fit(source, text_file, tmp_path / "one", end_to_end=ModelTuning())
    last = tmp_path / "one-ckpt" / "last.ckpt"
    other = make_model("llama", blocks=1)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight[-1, -1] += 1e-6
    other.save_pretrained(source)
    with pytest.raises(LitBinqError, match="another model"):
        fit(source, text_file, tmp_path / "two", ckpt_path=last, end_to_end=ModelTuning())


def test_a_fingerprint_sees_every_byte(make_model):
    mark = fingerprint(make_model("qwen2"))
    assert mark == fingerprint(make_model("qwen2"))
    for change in ("model.norm.weight", "model.layers.1.self_attn.k_proj.bias", "model.embed_tokens.weight"):
        model = make_model("qwen2")
        model.get_parameter(change).data.view(torch.int32).view(-1)[-1] ^= 1
        assert fingerprint(model) != mark
    assert fingerprint(make_model("qwen2", tied=False)) != mark
    assert fingerprint(make_model("qwen2").to(torch.bfloat16)) != mark
    model = make_model("qwen2")
    model.config.rms_norm_eps = 1e-5
    assert fingerprint(model) != mark


def test_a_trainers_number_of_epochs_is_refused(make_source, text_file, tmp_path):
    with pytest.raises(LitBinqError, match=r"trainer\.max_epochs: got 3, expected none.*`model\.tuning\.epochs`"):
        fit(make_source(blocks=1), text_file, tmp_path / "packed", trainer={"max_epochs": 3})
    assert not (tmp_path / "packed").exists()


def test_validation_reports_both_models(make_source, text_file, tmp_path):
    source = make_source()
    fit(source, text_file, tmp_path / "packed")
    module = BinQCalibration(str(source), packed=str(tmp_path / "packed"))
    make_trainer().validate(module, make_data(source, text_file), verbose=False)
    assert module.results["text"].keys() == {"packed", "fp"}
    summary = module.summary()
    assert summary["perplexity"]["text"]["fp"] > 1
    json.dumps(summary)


class KeepResults(pl.Callback):
    """Writes each process's perplexities to a file: what a process holds ends with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_end(self, trainer: pl.Trainer, module: BinQCalibration) -> None:
        (self.folder / f"rank-{trainer.global_rank}.json").write_text(json.dumps(module.results))


def test_two_processes_report_the_perplexity_of_one(make_source, text_file, tmp_path):
    source = make_source(blocks=1)
    fit(source, text_file, tmp_path / "packed", tuning=BlockTuning(epochs=0), end_to_end=ModelTuning(epochs=0))
    results = []
    for options in ({}, two_processes()):
        module = BinQCalibration(str(source), packed=str(tmp_path / "packed"))
        trainer = make_trainer(callbacks=[KeepResults(tmp_path)], use_distributed_sampler=False, **options)
        trainer.validate(module, make_data(source, text_file), verbose=False)
        results.append(json.loads((tmp_path / "rank-0.json").read_text())["text"])
    assert results[1] == pytest.approx(results[0], rel=1e-6)
    assert json.loads((tmp_path / "rank-1.json").read_text())["text"] == results[1]


def test_a_sharding_strategy_is_refused_by_name():
    for name in ("fsdp", "FSDPStrategy", "deepspeed_stage_3", "ModelParallelStrategy"):
        with pytest.raises(LitBinqError, match="expected `auto` or `ddp`"):
            refuse_sharding(name)
    for name in ("auto", "ddp", "ddp_spawn"):
        refuse_sharding(name)


def test_nothing_is_left_behind_when_a_stage_fails(make_source, text_file, tmp_path, monkeypatch):
    source = make_source()
    monkeypatch.setattr("lit_binq.formats.row_column.RowColumn.balanced", lambda s: type(s)(s.r / 0, s.c, s.B))
    with pytest.raises(LitBinqError, match=r"float16 cannot hold|finite"):
        fit(source, text_file, tmp_path / "packed", tuning=BlockTuning(epochs=0))
    assert not (tmp_path / "packed").exists()
    assert not list(tmp_path.glob(".packed*"))


def test_the_model_rests_on_the_host_whatever_place_lightning_prefers(model_folder, text_file, tmp_path, monkeypatch):
    """On a GPU Lightning makes it the default device while the module builds its model; `meta` stands for it here."""
    fit(model_folder, text_file, tmp_path / "usual")
    monkeypatch.setattr(SingleDeviceStrategy, "tensor_init_context", lambda *_, **__: torch.device("meta"))
    fit(model_folder, text_file, tmp_path / "elsewhere")
    assert_same(tmp_path / "usual", tmp_path / "elsewhere")
