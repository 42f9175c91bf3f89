"""Text to windows: the cutting rules, ranks, and what Lightning does with the loaders."""

import logging
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_binq.data.module import CalibrationData, TextSource, make_windows
from lit_binq.errors import LitBinqError
from lit_binq.models.load import load_tokenizer


@pytest.fixture
def make_data(tokenizer_folder, text_file):
    """CalibrationData over the small text: 20 windows of 16, 3 evaluation windows of 24."""

    def make(**options) -> CalibrationData:
        defaults = {
            "train": TextSource(str(text_file)),
            "window_length": 16,
            "windows": 20,
            "batch_size": 3,
            "evaluation": {"same": TextSource(str(text_file))},
            "eval_windows": 3,
            "eval_length": 24,
        }
        return CalibrationData(str(tokenizer_folder), **(defaults | options))

    return make


def at_rank(data: CalibrationData, rank: int, ranks: int, fn: str = "fit") -> CalibrationData:
    """Pretend that a trainer is attached."""
    data.trainer = SimpleNamespace(global_rank=rank, world_size=ranks, state=SimpleNamespace(fn=fn))
    return data


# Windows


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 200),
    length=st.integers(1, 20),
    count=st.integers(1, 30) | st.none(),
    take=st.sampled_from(["first", "random"]),
    seed=st.integers(0, 9),
)
def test_windows_are_cut_on_the_grid_without_overlap(tokens, length, count, take, seed):
    ids = torch.arange(tokens)
    if tokens < length:
        with pytest.raises(LitBinqError, match=f"got {tokens} tokens, expected at least {length}"):
            make_windows(ids, length, count, take=take, seed=seed)
        return
    windows = make_windows(ids, length, count, take=take, seed=seed)
    grid = [list(range(i * length, (i + 1) * length)) for i in range(tokens // length)]
    assert len(windows) == min(count or len(grid), len(grid))
    if take == "first":
        assert windows.tolist() == grid[: len(windows)]
    else:
        assert len({w[0] for w in windows.tolist()}) == len(windows)
        assert all(w in grid for w in windows.tolist())
    assert torch.equal(windows, make_windows(ids, length, count, take=take, seed=seed))


def test_random_windows_depend_on_the_seed_alone():
    ids = torch.arange(1000)
    torch.manual_seed(1)
    one = make_windows(ids, 10, 20, take="random", seed=3)
    torch.manual_seed(2)
    assert torch.equal(one, make_windows(ids, 10, 20, take="random", seed=3))
    assert not torch.equal(one, make_windows(ids, 10, 20, take="random", seed=4))


# The module


def test_windows_hold_the_texts_tokens(make_data, text_file, tokenizer_folder):
    data = make_data(held_out=0.15)
    data.setup("fit")
    text = text_file.read_text()
    ids = load_tokenizer(str(tokenizer_folder))(text).input_ids
    both = torch.cat([data.train_windows, data.held_out_windows])
    assert both.flatten().tolist() == ids[: 20 * 16]
    assert both.dtype == torch.int64
    assert len(data.held_out_windows) == 3


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.001, 1), (0.5, 10), (0.9, 18)])
def test_held_out_share(share, expected, make_data):
    data = make_data(held_out=share)
    data.setup("fit")
    assert (len(data.train_windows), len(data.held_out_windows)) == (20 - expected, expected)


def test_bos_begins_each_window(make_data, text_file):
    data = make_data(bos=True, held_out=0.0)
    data.setup("fit")
    assert data.train_windows.shape == (20, 16)
    assert (data.train_windows[:, 0] == 256).all()
    plain = make_data(window_length=15, held_out=0.0)
    plain.setup("fit")
    assert torch.equal(data.train_windows[:, 1:], plain.train_windows)


def test_sources_are_mixed_evenly(make_data, text_file, tmp_path):
    (tmp_path / "z.txt").write_text("z" * 400)
    (tmp_path / "y.txt").write_text("y" * 400)
    sources = [
        TextSource(str(text_file)),
        TextSource(str(tmp_path / "z.txt")),
        TextSource(str(tmp_path / "y.txt")),
    ]
    data = make_data(train=sources, windows=8, held_out=0.25)
    data.setup("fit")
    alphabet = {w[0]: len(set(w)) for w in torch.cat([data.train_windows, data.held_out_windows]).tolist()}
    kinds = [len(set(w)) > 1 for w in torch.cat([data.train_windows, data.held_out_windows]).tolist()]
    assert kinds == [True, False, False, True, False, False, True, False]  # 3 + 3 + 2, dealt in turn
    assert len(alphabet) >= 3


def test_short_text_is_warned_about_or_refused(make_data, tmp_path, caplog):
    (tmp_path / "short.txt").write_text("s" * 100)
    data = make_data(train=TextSource(str(tmp_path / "short.txt")))
    with caplog.at_level(logging.WARNING):
        data.setup("fit")
    assert len(data.train_windows) + len(data.held_out_windows) == 6
    assert "100 tokens: 6 windows of 16 instead of 20" in caplog.text
    with pytest.raises(LitBinqError, match=r"text too short: got 100 tokens, expected at least 101.*window_length"):
        make_data(train=TextSource(str(tmp_path / "short.txt")), window_length=101).setup("fit")
    with pytest.raises(LitBinqError, match="leaves none to calibrate on"):
        make_data(train=TextSource(str(tmp_path / "short.txt")), window_length=100).setup("fit")


@pytest.mark.parametrize("take", ["first", "random"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_calibration_windows_equally(take, ranks, make_data, caplog):
    parts = []
    with caplog.at_level(logging.WARNING):
        for rank in range(ranks):
            data = at_rank(make_data(take=take, held_out=0.35), rank, ranks)
            data.setup("fit")
            parts.append(data)
    whole = make_data(take=take, held_out=0.35)
    whole.setup("fit")
    for name, total in (("train_windows", 13), ("held_out_windows", 7)):
        shards = [getattr(part, name) for part in parts]
        assert {len(shard) for shard in shards} == {total // ranks}
        mine = [tuple(w) for shard in shards for w in shard.tolist()]
        assert len(mine) == total // ranks * ranks
        everything = [tuple(w) for w in getattr(whole, name).tolist()]
        assert sorted(mine) == sorted(everything[: len(mine)])
        assert f"{total % ranks} windows dropped" in caplog.text
    assert len({part.fingerprint() for part in [*parts, whole]}) == 1


def test_too_few_windows_for_the_ranks(make_data):
    with pytest.raises(LitBinqError, match="held_out: 1 windows for 2 ranks"):
        at_rank(make_data(held_out=0.01), 0, 2).setup("fit")


def test_train_loader_gives_every_window_once_in_order(make_data):
    data = make_data(held_out=0.0)
    data.setup("fit")
    seen = []
    for batch in data.train_dataloader():
        assert batch["index"].dtype == batch["input_ids"].dtype == torch.int64
        assert torch.equal(batch["input_ids"], data.train_windows[batch["index"]])
        seen += batch["index"].tolist()
    assert seen == list(range(20))  # 20 = 6 x 3 + 2: nothing is dropped


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_evaluation_windows_are_dealt_without_duplicates(ranks, make_data, text_file):
    seen = []
    for rank in range(ranks):
        data = at_rank(make_data(eval_batch_size=2), rank, ranks, "validate")
        data.setup("validate")
        assert len(data.train_windows) == 0  # only what the stage needs
        (loader,) = data.val_dataloader()
        seen += [tuple(w) for batch in loader for w in batch["input_ids"].tolist()]
        assert [len(list(loader)) for loader in data.test_dataloader()] == [len(list(loader))]
    ids = load_tokenizer(data.tokenizer)(text_file.read_text()).input_ids
    assert sorted(seen) == sorted(tuple(ids[i * 24 : (i + 1) * 24]) for i in range(3))
    assert data.eval_names == ["same"]


def test_evaluation_is_left_out_of_fit_and_reads_no_file_there(make_data):
    data = at_rank(make_data(evaluation={"gone": TextSource("/no/such/file.txt")}), 0, 1)
    data.setup("fit")
    assert data.val_dataloader() == []
    with pytest.raises(LitBinqError, match="no such file"):
        data.setup("validate")


def test_all_windows_for_evaluation(make_data, text_file):
    data = make_data(eval_windows=None)
    data.setup("test")
    (loader,) = data.test_dataloader()
    assert len(loader.dataset) == len(text_file.read_bytes()) // 24


def test_fingerprint_follows_tokens_and_rules_but_not_places(make_data, text_file, tmp_path):
    def mark(**options) -> str:
        data = make_data(**options)
        data.setup("fit")
        return data.fingerprint()

    same = mark()
    assert len(same) == 16
    assert int(same, 16) >= 0
    assert mark(batch_size=1) == same
    (tmp_path / text_file.name).write_bytes(text_file.read_bytes())
    assert mark(train=TextSource(str(tmp_path / text_file.name))) == same
    changed = text_file.read_bytes().replace(b"cat", b"cow", 1)
    (tmp_path / text_file.name).write_bytes(changed)
    others = {
        mark(train=TextSource(str(tmp_path / text_file.name))),
        mark(window_length=15),
        mark(windows=19),
        mark(take="random"),
        mark(take="random", seed=1),
        mark(bos=True),
        mark(held_out=0.2),
    }
    assert len(others | {same}) == 8
    with pytest.raises(LitBinqError, match="not set up"):
        make_data().fingerprint()


def test_rules_are_logged_on_the_first_rank_only(make_data, caplog):
    with caplog.at_level(logging.INFO):
        at_rank(make_data(), 1, 2).setup("fit")
        assert caplog.text == ""
        data = at_rank(make_data(), 0, 2)
        data.setup(None)
    for word in ("18 to calibrate on (288 tokens)", "2 held out", "no BOS", data.fingerprint(), "3 windows"):
        assert word in caplog.text
    assert data.fingerprint("evaluation") in data.describe()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"window_length": 1}, "window_length: got 1, expected at least 2"),
        ({"windows": 0}, "windows: got 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"eval_windows": 0}, "eval_windows"),
        ({"eval_length": 1}, "eval_length"),
        ({"held_out": 1.0}, "held_out: got 1.0"),
        ({"held_out": -0.1}, "held_out"),
        ({"take": "last"}, "take: got 'last'"),
        ({"train": []}, "train: got no text source"),
    ],
)
def test_options_out_of_range_are_named(options, match, make_data):
    with pytest.raises(LitBinqError, match=match):
        make_data(**options)


def test_bos_needs_a_bos_token(make_data, tokenizer_folder, tmp_path):
    tokenizer = load_tokenizer(str(tokenizer_folder))
    tokenizer.bos_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((tokenizer_folder / "config.json").read_bytes())
    data = make_data(bos=True)
    data.tokenizer = str(tmp_path)
    with pytest.raises(LitBinqError, match="has no BOS token"):
        data.setup("fit")


# Under Lightning


class Recorder(lightning.LightningModule):
    """Writes down which rows it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.train_rows: list[list[int]] = []
        self.eval_sizes: list[tuple[int, int]] = []

    def training_step(self, batch, _):
        if len(self.train_rows) <= self.current_epoch:
            self.train_rows.append([])
        self.train_rows[-1] += batch["index"].tolist()
        return self.weight.square()

    def validation_step(self, batch, _, dataloader_idx=0):
        self.eval_sizes.append((dataloader_idx, len(batch["input_ids"])))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def quiet_trainer(folder: Path, **options) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def test_lightning_skips_evaluation_while_fitting(make_data, text_file, tmp_path):
    sets = {"one": TextSource(str(text_file)), "two": TextSource(str(text_file))}
    data, module = make_data(held_out=0.0, evaluation=sets, eval_batch_size=2), Recorder()
    quiet_trainer(tmp_path, max_epochs=3, log_every_n_steps=1).fit(module, data)
    assert module.train_rows == [list(range(20))] * 3
    assert module.eval_sizes == []
    quiet_trainer(tmp_path).validate(module, data, verbose=False)
    assert module.eval_sizes == [(0, 2), (0, 1), (1, 2), (1, 1)]


@pytest.mark.parametrize(
    ("shares", "counts"), [((1, 1), (10, 10)), ((3, 1), (15, 5)), ((1, 1, 1), (7, 7, 6)), ((2, 1), (13, 7))]
)
def test_windows_follow_the_shares(make_data, text_file, tmp_path, shares, counts):
    names = [tmp_path / f"{i}.txt" for i in range(len(shares))]
    for i, name in enumerate(names):
        # every source is one letter over and over, so that a window tells where it came from
        name.write_text(f"{'abc'[i]} " * 2000, encoding="utf-8")
    data = make_data(train=[TextSource(str(n), share=s) for n, s in zip(names, shares, strict=True)], held_out=0.0)
    data.setup("fit")
    kinds = [tuple(w.unique().tolist()) for w in data.train_windows]
    found = [kinds.count(kind) for kind in dict.fromkeys(kinds)]
    assert sorted(found) == sorted(counts)
    half = kinds[: len(kinds) // 2]
    for kind in set(kinds):
        assert abs(half.count(kind) - kinds.count(kind) / 2) <= 1  # each source is spread over the whole list


def test_what_was_calibrated_on_is_counted_in_the_evaluation_sets(make_data, tmp_path, caplog):
    """13 words in a row: the second text holds one passage of the first, the third none."""
    words = " ".join(f"w{i}" for i in range(400))
    texts = {"a": words, "b": "x " * 40 + " ".join(words.split()[:13]) + " y" * 400, "c": "other words " * 100}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    sets = {name: TextSource(str(tmp_path / f"{name}.txt")) for name in "bc"}
    options = {"window_length": 400, "windows": 3, "held_out": 0.4, "eval_length": 400, "eval_windows": 1}
    data = at_rank(make_data(train=TextSource(str(tmp_path / "a.txt")), evaluation=sets, **options), 0, 1)
    with caplog.at_level(logging.INFO, "lit_binq.data.module"):
        data.setup("fit")
        data.setup("validate")
    lines = [line for line in caplog.messages if "sequences" in line]
    assert [line.split(":")[0] for line in lines] == ["evaluation set b", "evaluation set c"]
    assert "b: 1 of its" in lines[0]
    assert "c: 0 of its" in lines[1]


@given(shares=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), windows=st.integers(0, 40))
def test_sources_get_as_many_windows_as_are_asked_for(shares, windows):
    """All together exactly; each one if there are enough; none further from its share than rounding and that demand."""
    data = CalibrationData("none", train=[TextSource("none.txt", share=s) for s in shares], windows=max(windows, 6))
    counts = data._counts(windows)
    assert sum(counts) == windows
    assert min(counts) >= (windows >= len(shares))
    for count, share in zip(counts, shares, strict=True):
        assert -1 - len(shares) < count - windows * share / sum(shares) < 1 + 1e-9
