"""`bench decode` and `prefill`: engines give the tokens they should; processes, turns, what is missing or fails."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporting import export, random_model
from lit_binq.cli import main as cli
from lit_binq.errors import LitBinqError
from lit_binq_onnx.bench import generation
from lit_binq_onnx.bench.engines import ENGINES, Engine, Setting
from lit_binq_onnx.bench.generation import Sources, bench_generation, token_numbers
from lit_binq_onnx.bench.table import generation_table
from lit_binq_onnx.bench.worker import Worker, WorkerFailed, resident_memory
from native import require_native

IDS = [5, 7, 100, 200, 9, 33, 150]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    """An export with both routes, and the packed model it was made from."""
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    return folder, export("qwen3", folder)


@pytest.fixture(scope="module")
def full(tmp_path_factory, tokenizer) -> Path:
    """A full-precision model of the same shape."""
    folder = tmp_path_factory.mktemp("full")
    random_model("qwen3").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def greedy(model: Any, ids: list[int], steps: int) -> list[int]:
    """Likeliest tokens, everything computed anew for each."""
    ids = list(ids)
    with torch.no_grad():
        for _ in range(steps):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-steps:]


def tokens_of(engine: Engine, ids: list[int], steps: int) -> list[list[int]]:
    """Decoded three times: from the context, after a rewind, and after another text."""
    engine.reset()
    engine.prefill(ids)
    found = []
    for _ in range(2):
        engine.rewind()
        found.append(engine.decode(steps))
    engine.reset()
    engine.prefill(ids[::-1])
    engine.rewind()
    engine.decode(steps + 1)
    engine.reset()
    engine.prefill(ids)
    engine.rewind()
    return [*found, engine.decode(steps)]


@pytest.mark.slow
@pytest.mark.parametrize("fused", [True, False])
def test_the_stock_engine_gives_torchs_tokens_again_and_again(fused, exported, monkeypatch):
    folder, model = exported
    if not fused:
        import lit_binq_onnx.runtime.session as session

        monkeypatch.setattr(session, "FUSED", "no such file")
    engine = ENGINES["unmodified"](Setting("unmodified", str(folder), 1, 20))
    want = greedy(model, IDS, 7)[1:]  # the first one follows from the context alone: no decoding step chooses it
    assert tokens_of(engine, IDS, 6) == [want] * 3


def test_the_native_engine_repeats_itself(exported):
    require_native()
    first, *others = tokens_of(ENGINES["native"](Setting("native", str(exported[0]), 1, 20)), IDS, 6)
    assert len(first) == 6
    assert others == [first] * 2


def test_the_torch_engine_gives_the_models_tokens(full):
    before = torch.get_num_threads()
    try:
        engine = ENGINES["torch"](Setting("torch", str(full), 1, 20))
        assert tokens_of(engine, IDS, 6) == [greedy(random_model("qwen3"), IDS, 7)[1:]] * 3
    finally:
        torch.set_num_threads(before)


def test_resident_memory_reads_the_kernels_account(tmp_path):
    status = tmp_path / "status"
    status.write_text(
        "Name:\tpython\nVmHWM:\t    200 kB\n\nVmRSS:\t    150 kB\nRssAnon:\t 90 kB\nRssFile:\t 60 kB\nThreads:\t1\n"
    )
    assert resident_memory(status) == {"rss": 150 * 1024, "peak": 200 * 1024, "anon": 90 * 1024, "mapped": 60 * 1024}
    assert resident_memory(tmp_path / "nowhere") == dict.fromkeys(("rss", "peak", "anon", "mapped"))


# --- processes


def test_a_process_answers_measures_and_ends(exported):
    worker = Worker(Setting("unmodified", str(exported[0]), 1, 20))
    try:
        assert worker.started["load_seconds"] > 0
        assert worker.ask(do="prefill", ids=IDS)["seconds"] > 0
        first, second = (worker.ask(do="decode", steps=4) for _ in range(2))
        assert first["tokens"] == second["tokens"] == greedy(exported[1], IDS, 5)[1:]
        if Path("/proc/self/status").exists():
            assert 0 < worker.started["rss"] <= second["peak"]
        with pytest.raises(WorkerFailed, match="ONNX Runtime failed on input_ids"):
            worker.ask(do="prefill", ids=[10**6])
        with pytest.raises(WorkerFailed, match="its process ended with 0"):
            worker.ask(do="decode", steps=1)
    finally:
        worker.close()
    assert worker._process.returncode is not None


def test_a_process_that_is_gone_is_an_error(exported):
    worker = Worker(Setting("unmodified", str(exported[0]), 1, 20))
    worker._process.kill()
    with pytest.raises(WorkerFailed, match="its process ended with -9"):
        worker.ask(do="decode", steps=1)
    worker.close()
    with pytest.raises(WorkerFailed, match="RunError: exported folder 'nowhere': no such folder"):
        Worker(Setting("unmodified", "nowhere", 1, 20))


# --- the run, with processes that only say what they were asked


class FakeWorker:
    """Takes 1 s for each token of the native engine and 2 s for the others'; breaks where it is told to."""

    log: list[tuple[str, str]] = []  # noqa: RUF012  # shared on purpose; emptied by the fixture
    alive = 0
    breaks: tuple[str, int] | None = None

    def __init__(self, setting: Setting) -> None:
        if setting.source == "cannot be opened":
            raise WorkerFailed("OSError: it is broken")
        self.setting, self.asked = setting, 0
        self.started = {"import_seconds": 1.0, "load_seconds": 2.0, "rss": 100, "peak": 100, "anon": 50, "mapped": 50}
        FakeWorker.alive += 1

    def ask(self, **request: Any) -> dict[str, Any]:
        name = f"{self.setting.engine} {Path(self.setting.source).name}"
        self.asked += 1
        if FakeWorker.breaks == (self.setting.engine, self.asked):
            raise WorkerFailed("its process ended with -9")
        FakeWorker.log.append((name, request["do"]))
        tokens = request.get("steps") or len(request["ids"])
        seconds = tokens * (1.0 if self.setting.engine == "native" else 2.0)
        return {"seconds": seconds, "rss": 300, "peak": 400, "anon": 200, "mapped": 100}

    def close(self) -> None:
        FakeWorker.alive -= 1


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(generation, "Worker", FakeWorker)
    monkeypatch.setattr(generation, "PAUSE", 0.0)
    monkeypatch.setattr(generation, "buffer_bytes", lambda cache: 1000)
    monkeypatch.setattr(generation, "library_path", lambda: Path("there"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(FakeWorker, "log", [])
    monkeypatch.setattr(FakeWorker, "breaks", None)
    yield FakeWorker
    assert FakeWorker.alive == 0  # every process was ended, whatever happened


@pytest.fixture
def sources(exported, tmp_path) -> Sources:
    (tmp_path / "genai").mkdir()
    (tmp_path / "model.gguf").touch()
    out = str(exported[0])
    return Sources(out, [out], True, "some/source", str(tmp_path / "genai"), str(tmp_path / "model.gguf"))


def run(sources: Sources, job: Any = "decode", rounds: int = 2) -> list[generation.Record]:
    return bench_generation(sources, job, context=5, burst=4 if job == "decode" else 5, rounds=rounds, threads=1)


def test_everyone_is_opened_then_they_take_turns(fake, sources):
    records = run(sources)
    names = ["native tiny", "native tiny", "unmodified tiny", "torch source", "genai genai", "llama model.gguf"]
    assert fake.log[:6] == [(name, "prefill") for name in names]
    rounds = [fake.log[i : i + 6] for i in range(6, len(fake.log), 6)]
    assert len(rounds) == 3  # the first is not counted
    assert all(sorted(turns) == sorted((name, "decode") for name in names) for turns in rounds)
    assert len({tuple(turns) for turns in rounds}) == 3
    assert [r.kernel for r in records][:3] == ["lit-binq", "lit-binq tiny", "lit-binq file, unmodified ONNX Runtime"]
    first, second, third = records[:3]
    assert (first.tokens_per_s, first.ratio, second.ratio, third.tokens_per_s, third.ratio) == (1.0, 1.0, 1.0, 0.5, 2.0)
    assert (third.ratio_low, third.ratio_high) == (2.0, 2.0)
    assert (first.load_seconds, first.first_token_seconds, third.first_token_seconds) == (2.0, 5.0, 10.0)
    assert (first.rss_loaded_bytes, first.rss_bytes, first.peak_bytes, first.rounds) == (100, 300, 400, 2)
    assert (first.anon_bytes, first.mapped_bytes) == (200, 100)
    data = json.loads((Path(sources.out) / "lit_binq_onnx.json").read_text())["data_bytes"]
    assert first.gbytes_per_s == pytest.approx(data / 1e9)
    assert third.gbytes_per_s is None
    assert first.file_bytes > data


def test_a_prefill_is_timed_as_one(fake, sources):
    records = run(sources, "prefill")
    assert {do for _, do in fake.log} == {"prefill"}
    assert (records[0].tokens_per_s, records[2].tokens_per_s, records[0].gbytes_per_s) == (1.0, 0.5, None)


def test_one_that_breaks_is_listed_and_the_others_go_on(fake, sources, monkeypatch):
    monkeypatch.setattr(fake, "breaks", ("torch", 3))
    records = {r.kernel: r for r in run(Sources(sources.out, [], True, "some/source"))}
    assert (records["torch eager float32"].status, records["torch eager float32"].tokens_per_s) == ("failed", None)
    assert "ended with -9" in generation_table(list(records.values()))
    assert records["lit-binq file, unmodified ONNX Runtime"].ratio == 2.0
    broken = run(Sources(sources.out, [], False, "cannot be opened"))
    assert [(r.status, r.note) for r in broken if r.source == "cannot be opened"] == [
        ("failed", "OSError: it is broken")
    ]


def test_ours_that_breaks_is_an_error(fake, sources, monkeypatch):
    monkeypatch.setattr(fake, "breaks", ("native", 2))
    with pytest.raises(LitBinqError, match=r"bench decode: .*ended with -9"):
        run(sources)


def test_what_is_not_installed_or_not_given_is_a_row(fake, sources, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(generation, "library_path", lambda: None)
    records = {r.kernel: r for r in run(Sources(sources.out, [], True, None, None, sources.gguf))}
    assert {name: r.status for name, r in records.items()} == {
        "lit-binq": "not installed",
        "lit-binq file, unmodified ONNX Runtime": "measured",
        "torch eager float32": "not given",
        "onnxruntime-genai": "not installed",
        "llama.cpp": "not installed",
    }
    table = generation_table(list(records.values()))
    for words in ("pip install onnxruntime-genai", "pip install llama-cpp-python", "--source MODEL", "cmake"):
        assert words.lower() in table.lower()
    assert records["lit-binq file, unmodified ONNX Runtime"].ratio is None  # nothing of ours to compare with
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    later = {r.kernel: r.note for r in run(Sources(sources.out))}
    assert "--genai FOLDER" in later["onnxruntime-genai"]
    assert "--gguf FILE" in later["llama.cpp"]


def test_token_numbers_are_the_models(exported):
    ids = token_numbers(str(exported[0]), 500)
    assert ids == token_numbers(str(exported[0]), 500)
    assert 0 <= min(ids) < 10
    assert 250 < max(ids) < 260


# --- the command


def test_bench_decode_and_prefill_end_to_end(exported, tmp_path, capsys):
    require_native()
    for job, options in (("decode", ["--context", "9", "--tokens", "3"]), ("prefill", ["--tokens", "9"])):
        out = tmp_path / f"{job}.json"
        arguments = [str(exported[0]), *options, "--rounds", "1", "--json", str(out)]
        assert cli.main(["bench", job, *arguments]) == 0
        text = capsys.readouterr().out
        records = json.loads(out.read_text())
        assert [r["status"] for r in records[:2]] == ["measured"] * 2
        assert all(r["tokens_per_s"] > 0 and r["context"] == 9 and r["job"] == job for r in records[:2])
        assert records[0]["ratio"] == 1.0
        assert all(f"| {r['kernel']} |" in text for r in records)
        assert np.isfinite(records[1]["ratio"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--context", "0"], ["context", "0"]),
        (["--tokens", "0"], ["tokens", "0"]),
        (["--rounds", "0"], ["rounds", "0"]),
        (["--threads", "0"], ["threads", "0"]),
        (["--context", "120", "--tokens", "20"], ["120 + 20", "128 positions"]),
        (["--genai", "nowhere"], ["'nowhere'", "folder", "--genai"]),
        (["--gguf", "."], ["'.'", "file", "--gguf"]),
        (["--baselines", "nowhere"], ["'nowhere'", "no such folder"]),
    ],
)
def test_wrong_options_of_decode_are_one_line(arguments, words, exported, capsys):
    assert cli.main(["bench", "decode", str(exported[0]), *arguments]) == 1
    err = capsys.readouterr().err
    assert err.startswith("litbinq bench decode: error: ")
    assert err.count("\n") == 1
    assert [word for word in words if word not in err] == []


def test_decode_needs_an_exported_folder(tmp_path, capsys):
    assert cli.main(["bench", "decode", str(tmp_path)]) == 1
    assert "litbinq export" in capsys.readouterr().err
