"""The guide's worked example: its code is run as it stands, in a fit too, and on ONNX Runtime without our library."""

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, tiny_model

from fitting import fit
from lit_binq.calibration.options import BlockTuning, ClosedForm, ModelTuning
from lit_binq.formats import FORMATS, OPERATORS
from lit_binq.formats.manifest import read_manifest
from lit_binq.formats.registry import packed_linears
from lit_binq.hub.save_load import load_packed
from lit_binq_onnx.build.export import export_onnx
from lit_binq_onnx.functions import BODIES
from lit_binq_onnx.runtime.session import OnnxModel, positions

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "add-a-format.md"
BLOCK = re.compile(r'```python title="(\w+)\.py"\n(.*?)```', re.DOTALL)
IDS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The guide's files, importable; what they register is forgotten afterwards."""
    folder, known = tmp_path_factory.mktemp("guide"), [dict(table) for table in (FORMATS, OPERATORS, BODIES)]
    files = dict(BLOCK.findall(GUIDE.read_text(encoding="utf-8")))
    assert set(files) == {"ternary", "ternary_solver", "ternary_body", "use"}
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    tiny_model("qwen2", blocks=2).save_pretrained(folder / "source")
    byte_tokenizer().save_pretrained(folder / "source")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for name in files:
        sys.modules.pop(name, None)
    for table, before in zip((FORMATS, OPERATORS, BODIES), known, strict=True):
        for name in table.keys() - before.keys():
            del table[name]


def same_on_unmodified_runtime(packed: Path, exported: OnnxModel) -> None:
    with torch.no_grad():
        expected = load_packed(packed)[0](input_ids=IDS).logits.numpy()
    mask = np.ones(IDS.shape, np.int64)
    got = exported.forward(IDS.numpy(), mask, positions(mask), exported.empty_past(len(IDS)))[0]
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


def test_the_code_of_the_guide_runs_as_it_stands(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    use = importlib.import_module("use")
    layers = packed_linears(use.loaded)
    stored = sum(t.nbytes for layer in layers.values() for t in layer.weight_buffers().values())
    bits = 8 * stored / sum(layer.in_features * layer.out_features for layer in layers.values())
    assert f"{bits:.2f} true bits, {len(layers)} nodes TernaryMatMul" in capsys.readouterr().out
    assert {entry["format"] for entry in read_manifest(place / "packed")["linears"].values()} == {"ternary"}
    same_on_unmodified_runtime(place / "packed", use.session)


def test_it_goes_through_a_fit_with_tuning(place, text_file):
    """Codes move, what is stored is what was tuned, and the graph is exported."""
    solver = importlib.import_module("ternary_solver").TernarySolver
    importlib.import_module("ternary_body")
    module = fit(
        place / "source",
        text_file,
        place / "fitted",
        closed_form=ClosedForm(solver=solver(threshold=0.6)),
        tuning=BlockTuning(epochs=2),
        end_to_end=ModelTuning(epochs=1),
    )
    assert all(r.after < r.before for r in module.records[:2])
    loaded, tokenizer = load_packed(place / "fitted")
    values = torch.cat([m.solution().Q.flatten() for m in packed_linears(loaded).values()]).unique()
    assert values.tolist() == [-1, 0, 1]
    export_onnx(loaded, tokenizer, place / "fitted-onnx", packed=place / "fitted", check=False)
    same_on_unmodified_runtime(place / "fitted", OnnxModel(place / "fitted-onnx", native=False))
