"""Files written whole or not at all; JSON that any reader takes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lit_binq.errors import LitBinqError
from lit_binq.utils.files import finite, new_folder, numbers, read_json, write_bytes, write_json

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


@settings(deadline=None, max_examples=50)
@given(value=values)
@example(value=math.nan)
@example(value={"a": [1.0, -math.inf]})
def test_files_are_strict_json(value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("json") / "deep" / "value.json"
    write_json(path, value)
    assert json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse) == finite(value)
    assert [f.name for f in path.parent.iterdir()] == ["value.json"]


def test_what_is_not_finite_is_null_and_infinite_again() -> None:
    value = {"a": [math.inf, 1.0, (-math.inf, 2)], "b": math.nan, "c": True}
    assert finite(value) == {"a": [None, 1.0, [None, 2]], "b": None, "c": True}
    assert numbers({"fp": 2.5, "packed": None}) == {"fp": 2.5, "packed": math.inf}


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(LitBinqError, match="cannot be written") as caught:
        write_json(tmp_path / "file" / "value.json", {})
    assert "\n" not in str(caught.value)
    with pytest.raises(LitBinqError, match="cannot be written"), new_folder(tmp_path / "file" / "folder"):
        pass


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(LitBinqError, match=r"taken.*cannot be written"):
        write_bytes(tmp_path / "taken", b"1")
    assert [f.name for f in tmp_path.iterdir()] == ["taken"]


def test_json_of_ours_is_of_its_version(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"version": 1, "more": [None]})
    assert read_json(path, 1, "a file", "do") == {"version": 1, "more": [None]}
    wrong = {
        '{"version": 2}': "version 2, expected 1",
        '{"version": true}': "version True, expected 1",
        "[1]": "version None, expected 1",
        '{"version": 1': "is damaged .*; do$",
        "\n": "is damaged",
    }
    for text, match in wrong.items():
        path.write_text(text)
        with pytest.raises(LitBinqError, match=f"^a file.* {match}") as caught:
            read_json(path, 1, "a file", "do")
        assert "\n" not in str(caught.value)
    path.write_bytes(b"\xff")
    with pytest.raises(LitBinqError, match="is damaged"):
        read_json(path, 1, "a file", "do")
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(LitBinqError, match=r"^a file cannot be read \(.+\); do$"):
            read_json(place, 1, "a file", "do")


def test_a_folder_takes_its_name_only_when_all_went_well(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with new_folder(target) as work:
        (work / "one").write_text("1")
    with pytest.raises(ZeroDivisionError), new_folder(target) as work:
        (work / "two").write_text(str(1 / 0))
    assert [f.name for f in target.iterdir()] == ["one"]
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
