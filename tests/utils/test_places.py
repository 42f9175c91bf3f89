"""Where a command writes: refused in one line before it begins, or written to as it is: links, mounts, full disks."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from command import one_line
from fitting import assert_same, fit
from lit_binq.cli import main as cli
from lit_binq.errors import LitBinqError
from lit_binq.utils.files import PART, new_folder, write_json
from lit_binq.utils.places import Place, free_bytes, require_folder, require_output_places

MANIFEST = "manifest.json"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """disk(name, size, options): a small disk of its own, mounted; skipped where mounting is not allowed."""
    mounted = []

    def mount(name: str = "disk", size: str = "8m", options: str = "") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}{options}", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting needs a privilege that this process lacks")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def write(target: Path, *names: str, size: int = 1) -> None:
    """A folder of ours with a manifest and files of `size` bytes."""
    require_folder(target, "out", MANIFEST)
    with new_folder(target, MANIFEST) as work:
        for name in names:
            (work / name).parent.mkdir(exist_ok=True)
            (work / name).write_bytes(bytes(size))
        (work / MANIFEST).write_text("{}")


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_an_empty_mounted_folder_is_written_into(disk):
    target = disk()
    (target / "lost+found").mkdir()
    write(target, "a", "deep/b")
    assert names(target) == ["a", "deep/b", MANIFEST]
    assert target.is_mount()
    write(target, "c")  # and again, over an older one
    assert names(target) == ["c", MANIFEST]
    assert [p.name for p in target.parent.iterdir()] == ["disk"]


def test_two_mounts_of_one_disk_are_told_apart(disk, tmp_path):
    """A bind mount has the number of the disk around it, so os.path.ismount does not see it."""
    around = disk()
    (around / "there").mkdir()
    (around / "target").mkdir()
    subprocess.run(["mount", "--bind", str(around / "there"), str(around / "target")], check=True)
    try:
        assert not os.path.ismount(around / "target")
        write(around / "target", "a")
        assert names(around / "there") == ["a", MANIFEST]
    finally:
        subprocess.run(["umount", str(around / "target")], check=True)


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "big" / "place").mkdir(parents=True)
    (tmp_path / "target").symlink_to(tmp_path / "big" / "place")
    for name in ("a", "b"):
        write(tmp_path / "target", name)
        assert (tmp_path / "target").is_symlink()
        assert names(tmp_path / "big" / "place") == [name, MANIFEST]
    (tmp_path / "big" / "older.json").write_text("{}")
    (tmp_path / "results.json").symlink_to(tmp_path / "big" / "older.json")
    write_json(tmp_path / "results.json", {"a": 1})
    assert (tmp_path / "results.json").is_symlink()
    assert json.loads((tmp_path / "big" / "older.json").read_text()) == {"a": 1}


def test_a_device_is_written_to_and_stays_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    require_output_places([Place("results", tmp_path / "pipe", "file")])
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_json(tmp_path / "pipe", {"a": 1})
    assert json.loads(os.read(reader, 100)) == {"a": 1}
    os.close(reader)
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]
    assert (tmp_path / "pipe").is_fifo()


def test_files_of_others_in_an_older_folder_stay(tmp_path):
    write(tmp_path / "out", "a", "deep/b")
    (tmp_path / "out" / "onnx").mkdir()
    (tmp_path / "out" / "onnx" / "model.onnx").write_text("mine")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    write(tmp_path / "out", "c")
    assert names(tmp_path / "out") == ["c", MANIFEST, "notes.txt", "onnx/model.onnx"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_one_line_and_leaves_what_was_there(disk, tmp_path):
    target = disk(size="256k")
    write(target, "a", size=4096)
    for place in (target, target / "new" / "folder"):
        with pytest.raises(LitBinqError, match=r"cannot be written \(No space left on device\)"):
            write(place, "big", size=1 << 20)
        assert names(target) == ["a", MANIFEST]
    with pytest.raises(LitBinqError, match=r"cannot be written \(No space left on device\)"):
        write_json(target / "value.json", ["x" * (1 << 20)])
    assert names(target) == ["a", MANIFEST]
    (target / "fill").write_bytes(bytes(free_bytes(target / "new" / "folder")))
    assert free_bytes(target) == 0
    for kind in ("folder", "file", "parent"):
        with pytest.raises(LitBinqError, match=r"^x: .*No space left on device"):
            require_output_places([Place("x", target / "new", kind)])


def test_an_error_of_rust_code_is_told_like_one_of_python(tmp_path):
    with pytest.raises(LitBinqError, match="No space left on device"), new_folder(tmp_path / "out"):
        raise Exception("I/O error: No space left on device (os error 28)")
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "out"):
        (tmp_path / "nowhere").read_text()  # reading something else says nothing about the place
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_ours_and_goes(disk, tmp_path):
    """Killed within a write: beside the target, inside a mounted one, between two renames."""
    target = disk("mounted")
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom lit_binq.utils.files import new_folder\n"
        "with new_folder(Path(sys.argv[1]), 'manifest.json') as work:\n"
        "    (work / 'a').write_text('half')\n    os.kill(os.getpid(), 9)\n"
    )
    for place in (tmp_path / "out", target):
        assert subprocess.run([sys.executable, "-c", script, str(place)]).returncode == -9
    assert any(p.name.startswith(PART) for p in target.iterdir())
    assert any(p.name.startswith(".out.") for p in tmp_path.iterdir())
    (target / PART).touch()  # as if it had been killed while files were put in place
    (target / "b").write_text("half")
    for place in (tmp_path / "out", target):
        write(place, "a", "b")
        assert names(place) == ["a", "b", MANIFEST]
    (tmp_path / "out").rename(tmp_path / ".out.abcdefgh.old")
    write(tmp_path / "other", "a")
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "out", MANIFEST):
        raise ZeroDivisionError
    assert names(tmp_path / "out") == ["a", "b", MANIFEST]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mounted", "other", "out"]


def refused(place: Place, *words: str) -> None:
    with pytest.raises(LitBinqError) as caught:
        require_output_places([place])
    line = str(caught.value)
    assert line.startswith(place.option)
    assert "\n" not in line
    assert [w for w in words if w not in line] == []


@pytest.mark.parametrize("kind", ["folder", "file", "parent"])
def test_places_that_cannot_be_written_to(kind, disk, tmp_path):
    locked = disk("locked")
    subprocess.run(["mount", "-o", "remount,ro", str(locked)], check=True)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "gone").symlink_to(tmp_path / "unmounted")
    before = sorted(p.name for p in tmp_path.iterdir())
    refused(Place("x", locked / "new", kind), "Read-only file system")
    refused(Place("x", tmp_path / "file" / "new", kind), "file")
    refused(Place("x", tmp_path / "gone" / "new", kind), "unmounted", "not there")
    refused(Place("x", tmp_path / "gone", kind), "unmounted", "not there")
    refused(Place("x", tmp_path / "new" / ("n" * 300), kind), "File name too long")
    refused(Place("x", tmp_path / "/".join(["n" * 200] * 25), kind), "File name too long")
    if kind != "file":
        refused(Place("x", tmp_path / "file", kind), "a file of this name exists")
    require_output_places([Place("x", tmp_path / "new" / "deep" / "place", kind)])
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_folder_of_another_user(tmp_path):
    """Root may write anywhere: the question is asked by a process that is not root."""
    tmp_path.chmod(0o755)
    (tmp_path / "theirs").mkdir(mode=0o755)
    script = (
        "import sys; from pathlib import Path; from lit_binq.utils.places import *\n"
        "from lit_binq.errors import LitBinqError\n"
        "for kind in ('folder', 'file', 'parent'):\n"
        "    try:\n        require_output_places([Place('x', Path(sys.argv[1]) / 'new', kind)])\n"
        "    except LitBinqError as error:\n        print(error)\n"
    )
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.getuid() == 0 else []
    if not command:
        (tmp_path / "theirs").chmod(0o555)
    ran = subprocess.run(
        [*command, sys.executable, "-c", script, str(tmp_path / "theirs")], capture_output=True, text=True
    )
    if "setpriv" in ran.stderr or "not permitted" in ran.stderr:
        pytest.skip(f"another user cannot be taken on: {ran.stderr}")
    assert ran.stdout.count("Permission denied") == 3, ran.stderr
    assert ran.stdout.count("\n") == 3


def test_files_that_are_not_ours_are_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / "older.json").write_text("{}")
    refused(Place("results", tmp_path / "thesis.tex", "file"), "no JSON file")
    refused(Place("results", tmp_path, "file"), "is a folder")
    require_output_places([Place("results", tmp_path / "older.json", "file")])
    refused(Place("packed", tmp_path, "folder", MANIFEST), "holds other files")


def test_places_in_each_others_way(tmp_path):
    packed = Place("model.packed", tmp_path / "packed", "folder", MANIFEST)
    for other in (
        Place("checkpoint.dirpath", tmp_path / "packed" / "checkpoints", "parent"),
        Place("checkpoint.dirpath", tmp_path / "packed", "parent"),
        Place("results", tmp_path / "packed", "file"),
    ):
        with pytest.raises(LitBinqError, match=rf"^{other.option}.*model\.packed"):
            require_output_places([packed, other])
    require_output_places([packed, Place("results", tmp_path / "packed" / "results.json", "file")])
    require_output_places([packed, Place("checkpoint.dirpath", tmp_path, "parent")])


@pytest.fixture
def config(tmp_path: Path, make_source, text_file) -> Path:
    text = {"path": str(text_file)}
    value = {
        "model": {"model": str(make_source()), "tuning": {"epochs": 0}},
        "data": {"train": text, "window_length": 48, "windows": 12, "evaluation": {"text": text}}
        | {"eval_windows": 4, "eval_length": 48},
        "trainer": {"accelerator": "cpu", "devices": 1},
        "evaluate": False,
    }
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(value))
    return tmp_path / "fit.yaml"


@pytest.mark.parametrize(
    ("option", "where"),
    [
        ("model.packed", "locked/packed"),
        ("checkpoint.dirpath", "locked/checkpoints"),
        ("checkpoint.dirpath", "fit.yaml"),
        ("results", "locked/results.json"),
        ("model.streams.cache_dir", "locked"),
    ],
)
def test_a_fit_asks_all_places_before_it_reads_a_word(option, where, config, disk, tmp_path, capsys, monkeypatch):
    locked = disk("locked")
    subprocess.run(["mount", "-o", "remount,ro", str(locked)], check=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lit_binq.data.module.CalibrationData.setup", lambda *_: pytest.fail("text was read"))
    monkeypatch.setattr("lit_binq.evaluation.module.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    arguments = ["--model.streams.cache", "disk"] if "cache" in option else []
    assert cli.main(["fit", "--config", str(config), *arguments, f"--{option}", where]) == 1
    line = one_line(capsys)
    assert line.startswith(f"litbinq fit: error: {option}")
    assert where in line


@pytest.mark.slow
def test_a_fit_into_a_mounted_folder_and_again(config, disk, tmp_path, capsys):
    target = disk("mounted")
    common = ["fit", "--config", str(config), "--checkpoint.dirpath", str(tmp_path / "ckpt"), "--model.packed"]
    for place in (target, tmp_path / "plain", target):
        assert cli.main([*common, str(place)]) == 0
    assert_same(target, tmp_path / "plain")
    assert cli.main(["export", str(target), str(disk("onnx")), "--check", "false"]) == 0
    assert (tmp_path / "onnx" / "model.onnx").is_file()


@pytest.mark.slow
def test_a_disk_that_fills_up_at_the_end_costs_nothing_but_the_writing(config, disk, tmp_path, capsys, monkeypatch):
    small = disk("small", size="32k")
    common = ["fit", "--config", str(config), "--checkpoint.dirpath", str(tmp_path / "ckpt"), "--model.packed"]
    assert cli.main([*common, str(small / "packed")]) == 1
    line, last = one_line(capsys), str(tmp_path / "ckpt" / "last.ckpt")
    assert [w for w in ("No space left on device", f"--ckpt_path {last}", "model.packed") if w not in line] == []
    assert list(small.iterdir()) == []
    monkeypatch.setattr(
        "lit_binq.calibration.block_stage.BlockStage.enter", lambda *_: pytest.fail("a block was done again")
    )
    monkeypatch.setattr(
        "lit_binq.calibration.streams.Streams.advance", lambda *_: pytest.fail("streams were computed again")
    )
    assert cli.main([*common, str(tmp_path / "packed"), "--ckpt_path", last]) == 0
    monkeypatch.undo()
    assert cli.main([*common, str(tmp_path / "whole")]) == 0
    assert_same(tmp_path / "packed", tmp_path / "whole")


def test_a_full_disk_under_the_checkpoint_is_one_line(config, disk, tmp_path, capsys):
    small = disk("small", size="24k")
    places = ["--checkpoint.dirpath", str(small), "--model.packed", str(tmp_path / "packed")]
    assert cli.main(["fit", "--config", str(config), *places]) == 1
    line = one_line(capsys)
    assert line.startswith("litbinq fit: error: checkpoint.dirpath")
    assert "No space left on device" in line
    assert names(small) == ["last.ckpt"]  # the one before, whole
    assert not (tmp_path / "packed").exists()
    places = ["--checkpoint.dirpath", str(tmp_path / "ckpt"), "--model.packed", str(tmp_path / "packed")]
    assert cli.main(["fit", "--config", str(config), *places, "--ckpt_path", str(small / "last.ckpt")]) == 0


def test_a_full_disk_under_the_streams_is_one_line(config, disk, tmp_path, capsys):
    """Its files are mapped into memory: writing to a page without a block behind it would kill the process."""
    small = disk("small", size="64k")
    places = ["--checkpoint.dirpath", str(tmp_path / "ckpt"), "--model.packed", str(tmp_path / "packed")]
    streams = ["--model.streams.cache", "disk", "--model.streams.cache_dir", str(small)]
    assert cli.main(["fit", "--config", str(config), *places, *streams]) == 1
    assert one_line(capsys).startswith("litbinq fit: error: preflight: disk at model.streams.cache_dir")
    streams += ["--model.preflight.check_resources", "false"]
    assert cli.main(["fit", "--config", str(config), *places, *streams]) == 1
    line = one_line(capsys)
    assert line.startswith("litbinq fit: error: streams.cache_dir")
    assert "No space left on device" in line
    assert list(small.iterdir()) == []


def test_streams_on_disk_leave_no_file_whatever_ends_the_process(tmp_path, make_source, text_file):
    """Their files have no name from the beginning, so that the system frees them."""
    from lightning.pytorch.callbacks import Callback

    from lit_binq.calibration.streams import StreamOptions

    class Look(Callback):
        seen: list[str] | None = None

        def on_train_epoch_end(self, trainer, module) -> None:
            self.seen = [p.name for p in cache.iterdir()]

    cache = tmp_path / "cache"
    cache.mkdir()
    look = Look()
    fit(make_source(), text_file, tmp_path / "packed", callbacks=[look], streams=StreamOptions("disk", str(cache)))
    assert look.seen == []
