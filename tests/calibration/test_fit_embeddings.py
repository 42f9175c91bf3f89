"""Embeddings in the model stage: tuned only if asked to, tied where they were, stored, and back after a resume."""

import pytest
import torch

from fitting import KeepEach, Remember, assert_same, fit, stored
from lit_binq.calibration.options import BlockTuning, ModelTuning
from lit_binq.formats.manifest import read_manifest
from lit_binq.hub.save_load import load_packed
from lit_binq.models.load import load_model

OFF, NO_MODEL_STAGE = BlockTuning(epochs=0), ModelTuning(epochs=0)


def end_to_end(lr: float, **options: float) -> ModelTuning:
    """One epoch of the model stage that is kept whatever it brings: the training loss falls."""
    return ModelTuning(epochs=1, lr_embeddings=lr, **{"lr_codes": 0.0} | options)


def matrices(folder) -> dict[str, torch.Tensor]:
    """Stored embeddings and head."""
    return {
        n: t
        for n, t in stored(folder).items()
        if n.rpartition(".")[0].endswith(("embed_tokens", "lm_head", "positions"))
    }


@pytest.mark.grid(2)
@pytest.mark.parametrize("kind", ["llama", "opt"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("lr", [0.0, 0.02])
def test_embeddings_move_only_if_they_have_a_rate(kind, tied, lr, make_source, text_file, tmp_path):
    source, remember = make_source(kind, tied=tied, blocks=1), Remember()
    module = fit(
        source,
        text_file,
        tmp_path / "packed",
        tuning=OFF,
        end_to_end=end_to_end(lr),
        callbacks=[remember],
        data={"held_out": 0.0},
    )
    assert module.records[-1].best_epoch == 1
    teacher = load_model(str(source))
    original, found = teacher.state_dict(), matrices(tmp_path / "packed")
    assert len(found) == 1 + (not tied) + (kind == "opt")  # OPT learns its positions
    for name, t in found.items():
        assert t.dtype == torch.float16
        assert torch.equal(t, original[name].half()) == (lr == 0), name
    model, _ = load_packed(tmp_path / "packed")
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding is head) == tied
    assert bool(read_manifest(tmp_path / "packed")["tied"]) == tied
    with torch.no_grad():
        assert torch.equal(model(input_ids=torch.arange(24).reshape(1, -1)).logits, remember.logits)
    # The teacher of the fit is the source still.
    assert all(torch.equal(p, original[name]) for name, p in module.work.teacher.state_dict().items())


@pytest.mark.grid(1)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("stage", [1, 2])
def test_resuming_before_and_behind_the_model_stage(tied, stage, make_source, text_file, tmp_path):
    source, keep = make_source(tied=tied, blocks=1), KeepEach(str(tmp_path / "kept"))
    options = {"tuning": OFF, "end_to_end": end_to_end(0.02, lr_codes=0.02)}
    fit(source, text_file, tmp_path / "whole", callbacks=[keep], **options)
    resumed = fit(
        source, text_file, tmp_path / "resumed", ckpt_path=tmp_path / "kept" / f"stage-{stage}.ckpt", **options
    )
    assert [r.title for r in resumed.records] == ["block 0", "model"]
    assert_same(tmp_path / "whole", tmp_path / "resumed")
    assert read_manifest(tmp_path / "whole")["tied"] == read_manifest(tmp_path / "resumed")["tied"]


def test_embeddings_alone_may_be_tuned(make_source, text_file, tmp_path):
    source = make_source(blocks=1)
    fit(source, text_file, tmp_path / "none", tuning=OFF, end_to_end=NO_MODEL_STAGE)
    only = end_to_end(0.02, lr_scales=0.0, lr_norms=0.0)
    module = fit(source, text_file, tmp_path / "only", tuning=OFF, end_to_end=only)
    assert module.records[-1].after < module.records[-1].before
    before, after = stored(tmp_path / "none"), stored(tmp_path / "only")
    assert [n for n in before if not torch.equal(before[n], after[n])] == ["model.embed_tokens.weight"]
