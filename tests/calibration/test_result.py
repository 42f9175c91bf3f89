"""What a fit hands over: its line of progress a stage, and the facts that stay with the packed folder."""

import logging
import re

import pytest

from fitting import T, fit
from lit_binq.calibration.options import BlockTuning, ModelTuning
from lit_binq.formats.manifest import read_manifest


def test_one_line_a_stage(make_source, text_file, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="lit_binq"):
        fit(make_source(), text_file, tmp_path / "packed")
    lines = [r.getMessage() for r in caplog.records if r.name == "lit_binq.calibration.result"]
    stages = [line for line in lines if line.startswith("stage ")]
    assert [line.split(" loss")[0].split() for line in stages] == [
        ["stage", "1/3", "block", "0"],
        ["stage", "2/3", "block", "1"],
        ["stage", "3/3", "model"],
    ]
    pattern = r"loss \d\.\d{4} -> \d\.\d{4} \(epoch [012] of [12]\), \d\.\d{3} true bits, \d+\.\d s, \d+:\d\d left"
    assert all(re.search(pattern, line) for line in stages)
    assert [line.endswith("left + model stage") for line in stages] == [True, True, False]
    assert stages[1].endswith("0:00 left + model stage")
    assert lines[-1].startswith(f"wrote {tmp_path / 'packed'}: ")
    assert f"calibrated on {16 * T} tokens" in lines[-1]


@pytest.mark.parametrize("epochs", [0, 1])
def test_facts_of_the_run(epochs, make_source, text_file, tmp_path):
    module = fit(
        make_source(blocks=1),
        text_file,
        tmp_path / "packed",
        tuning=BlockTuning(epochs=epochs),
        end_to_end=ModelTuning(),
    )
    facts = read_manifest(tmp_path / "packed")["facts"]
    assert [(s["title"], s["epochs"]) for s in facts["stages"]] == [("block 0", epochs)]
    assert facts["stages"][0]["before"] == module.records[0].before
    assert facts["calibration_seconds"] >= 0
    assert facts["calibration_peak_memory"]["host_bytes"] > 10**7
    assert facts["calibration_peak_memory"]["device_bytes"] is None
    assert facts["identity"].keys() == {"model", "data", "options"}
    assert facts["data"]["fingerprint"] == facts["identity"]["data"]
    assert facts["versions"].keys() == {"torch", "lightning", "transformers"}
