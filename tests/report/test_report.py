"""Reports: sentences follow the numbers, pages need nothing else, runs share axes, errors are one line."""

import builtins
import json
import re
import struct
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_binq.errors import LitBinqError
from lit_binq.formats.manifest import VERSION
from lit_binq.report.figures import draw
from lit_binq.report.page import PAGE, report
from lit_binq.report.plotting import Drawing, extreme, rank_correlation, short_names, trend
from lit_binq.report.runs import load_run, load_runs
from lit_binq.utils.command_line import run
from lit_binq.utils.json_records import (
    DIAGNOSTICS,
    BlockLosses,
    BlockMeasures,
    EffectiveRanks,
    LinearMeasures,
    Probe,
    write_diagnostics,
)
from measured_runs import BLOCKS, FALLING, LAYERS, STEADY, block, probed

Make = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> Make:
    """make(name, blocks, epochs=..., facts=...) -> folder of a run, its packed folder inside without tensors."""

    def make(name: str, blocks: list[BlockMeasures] | None = None, epochs: int = 3, **facts: Any) -> Path:
        folder = tmp_path / name
        (folder / "packed").mkdir(parents=True)
        stages = [
            {"stage": i, "title": f"block {i}", "before": 0.4 + i, "after": 0.2 + i, "epochs": epochs, "best_epoch": 1,
             "seconds": 1.5} for i in range(BLOCKS)
        ]  # fmt: skip
        options = {"closed_form": {"objective": "pseudo_target", "shrinkage": 0.1}, "tuning": {"epochs": epochs}}
        told = {
            "source": "some/model",
            "stages": stages,
            "identity": {"options": json.dumps(options)},
            "data": {"rules": "2 windows"},
            **facts,
        }
        manifest = {"version": VERSION, "linears": {}, "tied": {}, "unquantized_dtype": "float16", "true_bits": 1.046,
                  "dense_weights": 100, "facts": told}  # fmt: skip
        (folder / "packed" / "lit_binq.json").write_text(json.dumps(manifest))
        if blocks is not None:
            write_diagnostics(folder / DIAGNOSTICS, blocks)
        return folder

    return make


def drawings(*folders: Path) -> dict[str, Drawing]:
    return {d.name: d for d in draw(load_runs([str(f) for f in folders]))}


# ---- sentences ------------------------------------------------------------------------------------------------------


def test_sentences_follow_the_numbers(make_run: Make) -> None:
    falling, steady = drawings(make_run("falling", FALLING)), drawings(make_run("steady", STEADY, epochs=0))
    assert "the output similarity falls with depth, from 0.9 (block 0) to 0.4 (block 5)".lower() in (
        falling["similarity"].sentence.lower()
    )
    assert "has no steady trend with depth" in steady["similarity"].sentence
    assert falling["tokens"].sentence.endswith("to 0.6 (block 5): interactions break down with depth.")
    assert "no steady break-down" in steady["tokens"].sentence
    assert "tuning lowers it in 6 of 6 blocks, by 7% in the median" in falling["stages"].sentence
    assert "by the closed form alone" in steady["stages"].sentence
    assert (
        "the divergence in nats rises with depth, from 0.1 (block 0) to 0.6 (block 5)."
        in falling["attention"].sentence.lower()
    )
    assert "above full precision in 6 of 6 blocks" in falling["rank"].sentence
    assert "with 0.400" in falling["layers"].sentence
    assert all(re.fullmatch(r"[A-Z][^\n]*\.", d.sentence) for d in falling.values())


def test_rising_is_told_as_rising(make_run: Make) -> None:
    rising = drawings(make_run("r", [block(i, 0.2 + 0.1 * i, grams=9.0 - i) for i in range(BLOCKS)]))
    assert "output similarity rises with depth" in rising["similarity"].sentence
    assert "interactions recover with depth" in rising["tokens"].sentence


@pytest.mark.parametrize(
    ("pseudo", "said"),
    [
        (
            (0.2, 0.4),
            "error than weight in 4 of 4 layers, and yet a higher block loss in 4 of these",
        ),
        ((0.2, 0.301), "in 4 of these, by more than 1% in 0."),
        ((0.2, 0.2), "in 4 of 4 layers, and a higher block loss in none of these."),
        ((0.7, 0.4), "in 0 of 4 layers, and a higher block loss in none of these."),
    ],
)
def test_the_probe_counts(make_run: Make, pseudo: tuple[float, float], said: str) -> None:
    blocks = [block(i, 0.5, probe=probed((0.5, 0.3), pseudo)) for i in range(2)]
    drawn = drawings(make_run("probe", blocks))
    assert said in drawn["probe-0"].sentence
    added = f"{pseudo[1] - 0.1:.3g}"
    assert f"by pseudo_target it is self_attn.q_proj that adds most to the loss of its block, {added}" in (
        drawn["probe-bars-0"].sentence
    )


def test_several_runs_share_axes_and_are_compared(make_run: Make) -> None:
    one, two = make_run("one", FALLING), make_run("two", [*STEADY, block(BLOCKS, 0.8, 1.0)])
    drawn = drawings(one, two)["similarity"]
    (ax,) = drawn.figure.axes
    curves = [line.get_ydata() for line in ax.get_lines()]
    assert len(curves) == 4  # two kinds for each of two runs
    np.testing.assert_allclose(curves[2], [0.9 - 0.1 * i for i in range(BLOCKS)])
    assert len(curves[3]) == BLOCKS + 1
    assert "one: the output similarity falls with depth" in drawn.sentence
    assert "two: the output similarity has no steady trend" in drawn.sentence
    # Block 6, which only `two` has, does not count.
    assert "the highest activation-conditioned similarity on average is one's, whose output similarity lies below" in (
        drawn.sentence
    )
    assert "in 5 of 5 later ones" in drawn.sentence
    assert "the highest output similarity is two's" in drawn.sentence
    labels = [t.get_text() for t in drawn.figure.legends[0].get_texts()]
    assert labels[:2] == ["one", "two"]


def test_every_axis_is_labelled(make_run: Make) -> None:
    blocks = [block(i, 0.5, probe=probed((0.5, 0.3), (0.2, 0.4))) for i in range(3)]
    for name, drawing in drawings(make_run("a", blocks), make_run("b", FALLING)).items():
        assert drawing.figure.axes[-1].get_xlabel() or name == "layers", name
        assert any(ax.get_ylabel() for ax in drawing.figure.axes), name
        assert drawing.sentence.endswith("."), name


@settings(deadline=None, max_examples=60)
@given(values=st.lists(st.integers(-5, 5), min_size=3, max_size=12))
def test_rank_correlation_against_pairs(values: list[int]) -> None:
    """Spearman is Pearson on mean ranks, counted here pair by pair."""
    n = len(values)
    ranks = [sum(b < a for b in values) + (sum(b == a for b in values) - 1) / 2 for a in values]
    mean = (n - 1) / 2
    over = sum((i - mean) * (r - mean) for i, r in enumerate(ranks))
    under = (sum((i - mean) ** 2 for i in range(n)) * sum((r - mean) ** 2 for r in ranks)) ** 0.5
    assert rank_correlation([float(v) for v in values]) == pytest.approx(over / under if under else 0.0)
    assert rank_correlation(sorted(set(values))) in (0.0, pytest.approx(1.0))


def test_layers_keep_names_that_tell_them_apart() -> None:
    assert short_names(["a.q_proj", "b.k_proj"]) == ["q_proj", "k_proj"]
    assert short_names(["self.q_proj", "cross.q_proj", "mlp.up"]) == ["self.q_proj", "cross.q_proj", "up"]


def test_trends_of_short_curves() -> None:
    assert trend({3: 0.5}, worst="lowest") == "is 0.5 in block 3, the only one"
    assert "no steady trend" in trend({0: 1.0, 1: 2.0}, worst="lowest")
    dip = {0: 0.9, 1: 0.2, 2: 0.95, 3: 0.8}
    assert trend(dip, worst="lowest").endswith("from 0.9 (block 0) to 0.8 (block 3), lowest in block 1 with 0.2")
    assert trend(dip, worst="highest").endswith("highest in block 2 with 0.95")
    assert extreme([], highest=True) is None


# ---- runs and pages -------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Collects what a page asks for, and checks that tags are balanced."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.tags: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone(make_run: Make, capsys: pytest.CaptureFixture[str]) -> None:
    notes = ["attention maps: not compared, <why> & how"]
    run = make_run("run", [block(i, 0.5, notes=notes, probe=probed((0.5, 0.3), (0.2, 0.4))) for i in range(3)])
    report(str(run))
    text = (run / "report" / PAGE).read_text(encoding="utf-8")
    page = Page(text)
    pngs = sorted((run / "report").glob("*.png"))
    assert {p.stem for p in pngs} == {
        "stages", "errors", "similarity", "tokens", "attention", "rank", "layers", "probe-0", "probe-bars-0",
    }  # fmt: skip
    assert len(page.sources) == len(pngs)
    assert all(s.startswith("data:image/png;base64,") for s in page.sources)
    assert "://" not in re.sub(r"base64,[^\"]*", "", text)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert 'name="viewport"' in text
    for told in ("some/model", "1.046", "pseudo_target", "2 windows of 10 tokens", "mlp.down_proj", notes[0]):
        assert told in page.text, told
    for png in pngs:
        data = png.read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert width == 1020
        assert 400 < height < 2500
    out = capsys.readouterr().out
    assert f"wrote {run / 'report' / PAGE}" in out
    assert "Interactions between tokens: " in out


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes_and_replaces_the_older_report(make_run: Make, tmp_path: Path) -> None:
    run = make_run("run", FALLING)
    report(str(run))
    first = (run / "report" / PAGE).read_bytes()
    (run / "report" / "old.png").write_bytes(b"")
    report(str(run))
    assert (run / "report" / PAGE).read_bytes() == first
    assert not (run / "report" / "old.png").exists()


def test_without_diagnostics_there_are_the_stages(make_run: Make, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run("bare")
    with caplog.at_level("INFO", logger="lit_binq"):
        report(str(run), out=str(run / "elsewhere"))
    assert [p.name for p in (run / "elsewhere").glob("*.png")] == ["stages.png"]
    assert "has no diagnostics" in (run / "elsewhere" / PAGE).read_text()
    assert "diagnostics.windows" in caplog.text


def test_a_run_without_anything_to_draw_still_has_its_facts(make_run: Make) -> None:
    run = make_run("empty", [], stages=[], identity="odd", data=None)
    report(str(run))
    text = (run / "report" / PAGE).read_text()
    assert "some/model" in Page(text).text
    assert "<img" not in text


def test_what_was_not_measured_is_left_out(make_run: Make) -> None:
    holes = [
        BlockMeasures(
            i, 1, 4, None, BlockLosses(None, None), EffectiveRanks(None, None, None, None), None,
            {LAYERS[0]: LinearMeasures(*[None] * 12)}, Probe(BlockLosses(None, None), {}),
        )
        for i in range(3)
    ]  # fmt: skip
    assert set(drawings(make_run("holes", holes))) == {"stages"}
    mixed = drawings(make_run("mixed", [FALLING[0], *holes[1:], *FALLING[3:]]))
    assert list(mixed["similarity"].figure.axes[0].get_lines()[0].get_xdata()) == [0, 3, 4, 5]
    one = drawings(make_run("one", FALLING[:1]))
    assert "in block 0, the only one" in one["similarity"].sentence


def test_names_are_harmless(make_run: Make) -> None:
    names = ["_hidden", "a$b$c", "<i>&", "量子"]
    runs = [make_run(n, FALLING) for n in names]
    report(str(runs[0]), baselines=[str(r) for r in runs[1:]])
    text = (runs[0] / "report" / PAGE).read_text(encoding="utf-8")
    assert "<i>" not in text
    assert all(n in Page(text).text for n in names)
    labels = [t.get_text() for t in drawings(*runs)["similarity"].figure.legends[0].get_texts()]
    assert labels[:4] == ["run _hidden", *names[1:]]


def test_runs_are_found_and_named(make_run: Make, tmp_path: Path) -> None:
    run = make_run("run", FALLING)
    assert load_run(run / "packed").name == load_run(run).name == "run"
    assert len(load_run(run / "packed").blocks) == BLOCKS
    (run / "packed").rename(run / "other")  # a folder around others: its diagnostics belong to nobody
    alone = load_run(run / "other")
    assert (alone.name, alone.blocks) == ("other", [])
    (run / DIAGNOSTICS).rename(run / "other" / DIAGNOSTICS)
    assert len(load_run(run / "other").blocks) == BLOCKS
    report(str(run / "other"))
    assert (run / "other-report" / PAGE).is_file()  # never inside: the packed folder's size is counted
    twins = load_runs([str(make_run("x/other")), str(make_run("y/other")) + "/"])
    assert [t.name for t in twins] == [str(tmp_path / "x/other"), str(tmp_path / "y/other")]


@pytest.mark.parametrize("form", ["{a},{b}", "[{a},{b}]"])
def test_the_command_line_takes_several_runs(make_run: Make, form: str) -> None:
    main, a, b = (make_run(n) for n in ("main", "a", "b"))
    run(report, [str(main), "--baselines", form.format(a=a, b=b), "--out", str(main / "o")], "litbinq report")
    assert "lit_binq: main, a, b" in (main / "o" / PAGE).read_text()


# ---- errors ---------------------------------------------------------------------------------------------------------


def one_line(said: str, *args: Any, **options: Any) -> None:
    with pytest.raises(LitBinqError, match=said) as caught:
        report(*args, **options)
    assert "\n" not in str(caught.value)


def test_errors_are_one_line(make_run: Make, tmp_path: Path) -> None:
    run = make_run("run", FALLING)
    one_line("no such folder", str(tmp_path / "none"))
    one_line("holds neither", str(tmp_path))
    one_line("is named twice", str(run), baselines=str(run / "packed"))
    one_line("at most 5", str(run), baselines=[str(make_run(f"r{i}")) for i in range(6)])
    (tmp_path / "file").write_text("")
    one_line("a file of this name", str(run), out=str(tmp_path / "file"))
    one_line("holds other files", str(run), out=str(run))
    one_line(r"stages\[0\].before: got 'x'", str(make_run("s", stages=[{"before": "x", "title": "block 0", "after": 1,
             "epochs": 0, "best_epoch": 0, "seconds": 0}])))  # fmt: skip
    one_line(r"stages\[0\]: got '3'", str(make_run("t", stages=[3])))
    one_line("facts.stages", str(make_run("u", stages=3)))
    (run / DIAGNOSTICS).write_text("{")
    one_line("is damaged", str(run))
    assert not (run / "report").exists()


def test_infinite_losses_of_a_stage_are_no_error(make_run: Make) -> None:
    """JSON as the fit writes it may hold Infinity."""
    stage = {"title": "block 0", "before": float("inf"), "after": 0.5, "epochs": 1, "best_epoch": 1, "seconds": 1.0}
    assert load_run(make_run("inf", stages=[stage])).stages[0].before is None
    report(str(make_run("inf2", stages=[stage])))


def test_nothing_half_written_stays(make_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run("run", FALLING)

    def fails(*_: Any) -> bytes:
        raise RuntimeError("no ink")

    monkeypatch.setattr("lit_binq.report.plotting.png", fails)
    with pytest.raises(RuntimeError, match="no ink"):
        report(str(run))
    assert sorted(p.name for p in run.iterdir()) == [DIAGNOSTICS, "packed"]


def test_a_missing_matplotlib_names_the_extra(make_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run, real = make_run("run", FALLING), builtins.__import__
    for name in [
        n
        for n in sys.modules
        if n.startswith(("lit_binq.report.figures", "lit_binq.report.plotting", "lit_binq.report.probe_figures"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    from lit_binq import report as package

    for name in ("figures", "plotting", "probe_figures"):
        monkeypatch.delattr(package, name)

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    one_line(r"lit-binq\[report\]", str(run))
