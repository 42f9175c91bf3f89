"""`bench shape`: its run, its records and table, and that nothing is left behind."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_config

from lit_binq.cli import main as cli
from lit_binq.errors import LitBinqError
from lit_binq_onnx.bench import generation
from lit_binq_onnx.bench import shape as module
from lit_binq_onnx.bench.four_bit import FourBitBuilder
from lit_binq_onnx.bench.shape import FOLDERS, Options, bench_shape, write_models
from lit_binq_onnx.bench.shapes import random_model, weights_of
from lit_binq_onnx.bench.table import shape_table
from lit_binq_onnx.bench.worker import WorkerFailed
from lit_binq_onnx.runtime.session import DATA
from native import require_native
from tiny_shapes import config, run, shape


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """With a config.json of a tiny shape."""
    config().save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def test_bench_shape_end_to_end(folder, tmp_path, capsys):
    require_native()
    place, out = tmp_path / "place", tmp_path / "figures.json"
    options = ["--past", "9", "--tokens", "4", "--rounds", "2", "--folder", str(place), "--json", str(out)]
    assert cli.main(["bench", "shape", folder, "--layers", "1", *options]) == 0
    text = capsys.readouterr().out
    ours, baseline = json.loads(out.read_text())
    assert [r["status"] for r in (ours, baseline)] == ["measured"] * 2
    assert [r["kernel"] for r in (ours, baseline)] == ["lit-binq, 1 bit", "ONNX Runtime, 4 bits, block 32"]
    assert (ours["ratio"], ours["blocks"], ours["full_blocks"]) == (1.0, 1, 2)
    assert (ours["context"], ours["burst"], ours["rounds"], ours["source"]) == (9, 4, 2, "")
    for r in (ours, baseline):
        assert r["cache_bytes"] == 2 * 1 * 2 * 16 * 4 * (9 + 2)
        read = (r["weight_bytes"] + r["cache_bytes"]) * r["tokens_per_s"] / 1e9
        assert r["gbytes_per_s"] == pytest.approx(read)
        assert r["share_of_read"] == pytest.approx(read / r["read_gbytes_per_s"])
        assert r["file_bytes"] > r["weight_bytes"]
        assert f"| {r['kernel']} |" in text
    assert "tiny, 1 of its 2 blocks: medians of 2 alternating bursts, 4 tokens decoded after 9, 1 thread" in text
    assert list(place.iterdir()) == []


def test_kept_models_stay_are_replaced_and_open(folder, tmp_path, capsys):
    require_native()
    arguments = ["bench", "shape", folder, "--past", "5", "--tokens", "2", "--rounds", "1", "--head_bits", "8"]
    for _ in range(2):
        assert cli.main([*arguments, "--folder", str(tmp_path / "kept"), "--keep", "true"]) == 0
    assert [f.name for f in (tmp_path / "kept").iterdir()] == ["tiny"]
    assert sorted(f.name for f in (tmp_path / "kept" / "tiny").iterdir()) == sorted(FOLDERS)
    ours, _ = (tmp_path / "kept" / "tiny" / name for name in FOLDERS)
    assert np.isfinite(run(ours)).all()
    (tmp_path / "mine" / "tiny").mkdir(parents=True)
    assert cli.main([*arguments, "--folder", str(tmp_path / "mine"), "--keep", "true"]) == 1
    assert "not what this command wrote" in capsys.readouterr().err
    assert cli.main([*arguments, "--keep", "true"]) == 1
    assert "--folder FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--past", "0"], ["past", "0"]),
        (["--tokens", "0"], ["tokens", "0"]),
        (["--rounds", "0"], ["rounds", "0"]),
        (["--threads", "0"], ["threads", "0"]),
        (["--block", "48"], ["block", "48", "128"]),
        (["--layers", "3"], ["layers", "3", "1 to the 2"]),
        (["--layers", "0"], ["layers", "0"]),
        (["--past", "500", "--tokens", "20"], ["500 + 20", "512 positions"]),
    ],
)
def test_wrong_options_are_one_line_and_leave_nothing(arguments, words, folder, tmp_path, capsys):
    place = tmp_path / "place"
    assert cli.main(["bench", "shape", folder, "--folder", str(place), *arguments]) == 1
    err = capsys.readouterr().err
    assert err.startswith("litbinq bench shape: error: ")
    assert err.count("\n") == 1
    assert [word for word in words if word not in err] == []
    assert not place.exists()


def test_models_that_do_not_fit_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "library_path", lambda: Path("there"))
    tiny_config("opt").save_pretrained(tmp_path / "opt")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    config(hidden_size=72, head_dim=16).save_pretrained(tmp_path / "odd")
    place = tmp_path / "place"
    expected = {
        "nowhere": "expected one of llama-7b",
        str(tmp_path / "opt"): "OPTForCausalLM is none of",
        str(tmp_path / "broken"): "cannot be read",
        str(tmp_path / "odd"): "expected a multiple of 16",
    }
    for source, words in expected.items():
        assert cli.main(["bench", "shape", source, "--folder", str(place), "--past", "9"]) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert words in err
        assert not place.exists() or list(place.iterdir()) == []


@pytest.mark.parametrize("keep", [False, True])
def test_a_failure_leaves_nothing_half_written(keep, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "library_path", lambda: Path("there"))

    def broken(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FourBitBuilder, "_mlp", broken)
    with pytest.raises(LitBinqError, match=r"cannot be written \(No space left on device\).*--folder"):
        bench_shape(shape(), Options(), folder=str(tmp_path), keep=keep)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(FourBitBuilder, "_mlp", lambda *_: math.sqrt(-1))
    with pytest.raises(ValueError, match="math domain"):
        bench_shape(shape(), Options(), folder=str(tmp_path), keep=keep)
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_and_no_library_are_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "library_path", lambda: None)
    with pytest.raises(LitBinqError, match="library is missing"):
        bench_shape(shape(), Options(), folder=str(tmp_path))
    monkeypatch.setattr(module, "library_path", lambda: Path("there"))
    usage = type("Usage", (), {"free": 10_000_000})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(LitBinqError, match=r"0\.0 GB are free, expected 0\.1 for the models"):
        bench_shape(shape(), Options(), folder=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [Options(), Options("grouped", 8, 128), Options(head_bits=0, block=16)])
def test_the_room_that_is_asked_for_is_enough_and_not_twice_as_much(options, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "_ROOM", 0)
    monkeypatch.setattr(module, "_require_room", lambda _, wanted: asked.append(wanted))
    write_models(shape(hidden_size=512, intermediate_size=1024, vocab_size=5000), tmp_path, options)
    size = sum((tmp_path / name / DATA).stat().st_size for name in FOLDERS)
    assert 0.97 * size < asked[0] < 1.3 * size


class Fake:
    """A process in which a token takes 1 s, or the baseline's 3; it says what it was asked to open."""

    opened: list[Any] = []  # noqa: RUF012  # emptied by the test
    breaks = ""

    def __init__(self, setting: Any) -> None:
        if setting.engine == Fake.breaks:
            raise WorkerFailed("OSError: it is broken")
        Fake.opened.append(setting)
        self.engine = setting.engine
        self.started = {"import_seconds": 1.0, "load_seconds": 2.0, "rss": 100, "peak": 100, "anon": 50, "mapped": 50}

    def ask(self, **request: Any) -> dict[str, Any]:
        seconds = (request.get("steps") or 1) * (1.0 if self.engine == "native" else 3.0)
        return {"seconds": seconds, "rss": 300, "peak": 400, "anon": 200, "mapped": 100}

    def close(self) -> None:
        pass


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(module, "library_path", lambda: Path("there"))
    monkeypatch.setattr(generation, "Worker", Fake)
    monkeypatch.setattr(generation, "PAUSE", 0.0)
    monkeypatch.setattr(generation, "buffer_bytes", lambda cache: 1000)
    monkeypatch.setattr(Fake, "opened", [])
    monkeypatch.setattr(Fake, "breaks", "")
    return Fake


def test_records_say_what_was_timed(fake, tmp_path):
    ours, baseline = bench_shape(shape(), Options(past=7, tokens=4, rounds=3, block=64), folder=str(tmp_path))
    # the baseline's process loads nothing of ours
    assert [setting.engine for setting in fake.opened] == ["native", "unmodified"]
    assert [Path(setting.source).name for setting in fake.opened] == list(FOLDERS)
    assert (ours.tokens_per_s, baseline.tokens_per_s, ours.ratio, baseline.ratio) == (
        1.0,
        pytest.approx(1 / 3),
        1.0,
        3.0,
    )
    assert (ours.format, baseline.format, ours.shape, ours.head_bits) == ("row_column", "4 bits, block 64", "tiny", 4)
    assert baseline.gbytes_per_s == pytest.approx((baseline.weight_bytes + baseline.cache_bytes) / 3e9)
    assert (baseline.rss_loaded_bytes, baseline.rss_bytes, baseline.anon_bytes, baseline.peak_bytes) == (
        100,
        300,
        200,
        400,
    )
    table = shape_table([ours, baseline])
    assert "| ONNX Runtime, 4 bits, block 64 | 0.333 (0.333 to 0.333) | 3000 | 3.00 (3.00 to 3.00) | 4.8" in table
    assert all(len(line.split("|")) == 17 for line in table.splitlines() if line.startswith("|"))


def test_a_baseline_that_fails_is_a_row_and_ours_an_error(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(fake, "breaks", "unmodified")
    records = bench_shape(shape(), Options(past=7, tokens=4, rounds=1), folder=str(tmp_path))
    assert (records[0].status, records[1].status) == ("measured", "failed")
    table = shape_table(records)
    assert "| failed: OSError: it is broken |" in table
    assert all(len(line.split("|")) == 17 for line in table.splitlines() if line.startswith("|"))
    monkeypatch.setattr(fake, "breaks", "native")
    with pytest.raises(LitBinqError, match="it is broken"):
        bench_shape(shape(), Options(past=7, tokens=4, rounds=1), folder=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_weights_are_counted(tmp_path):
    weights, bits = weights_of(random_model(shape(), dense_tables=False))
    assert weights == 2 * (64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 96)
    assert 1 < bits / weights < 2
