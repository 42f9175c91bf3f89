"""Text and windows of tokens: where a text comes from, how its documents are joined and how it is cut.

- A plain text file (.txt, .raw, .utf8) is one document, byte for byte. A folder of them is one document a
  file, in order of their names. A row of a data set (hub, .jsonl, .parquet) is one document. Documents are
  joined with `join`.
- Windows never overlap: ids are cut into windows of T at 0, T, 2T, ... and some of these are chosen.

Legend: n windows, T window length in tokens.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_binq.data.normalize import Normalization, normalize
from lit_binq.errors import LitBinqError, first_line

log = logging.getLogger(__name__)

PLAIN = (".txt", ".raw", ".utf8")
ROWS = {".jsonl": "json", ".parquet": "parquet"}
Take = Literal["first", "random"]


@dataclass
class TextSource:
    """Where a text comes from.

    Attributes:
        path: a hub data set (owner/name), a local .txt, .raw, .utf8, .jsonl or .parquet file, or a folder of
            such files of one type.
        name: configuration of a hub data set, e.g. wikitext-2-raw-v1.
        split: split of a hub data set. Local files have none.
        field: column that holds the text, for data sets, .jsonl and .parquet.
        join: what is put between documents; a single plain text file is one document.
        limit_documents: read this many documents only; a hub data set is then streamed, not stored.
        begin: where the text begins, as a share of its characters; moved to the next line's start.
        end: where it ends, likewise: a file's parts can serve calibration and evaluation without overlap.
        skip_lines: regular expression; lines that begin with a match are left out (before `begin` and `end` count).
        normalization: `verbatim`, or another style of the same words: `lower` (lower case), `treebank` (see
            lit_binq.data.normalize).
        share: weight of this source among several; windows are dealt in proportion.
    """

    path: str
    name: str | None = None
    split: str = "train"
    field: str = "text"
    join: str = "\n\n"
    limit_documents: int | None = None
    begin: float = 0.0
    end: float = 1.0
    skip_lines: str = ""
    normalization: Normalization = "verbatim"
    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.end <= 1:
            raise LitBinqError(f"begin, end: got {self.begin} and {self.end}, expected 0 <= begin < end <= 1")
        try:
            re.compile(self.skip_lines)
        except re.error as error:
            raise LitBinqError(
                f"skip_lines: {self.skip_lines!r} is no regular expression ({error}); expected one such as '<doc'"
            ) from error
        if self.normalization not in get_args(Normalization):
            raise LitBinqError(
                f"normalization: got {self.normalization!r}, expected one of {', '.join(get_args(Normalization))}"
            )
        if not 0 < self.share < float("inf"):
            raise LitBinqError(f"share: got {self.share}, expected a number above 0")
        if self.limit_documents is not None and self.limit_documents < 1:
            raise LitBinqError(f"limit_documents: got {self.limit_documents}, expected at least 1, or null for all")

    def rules(self) -> dict[str, Any]:
        """The fields as they go into a fingerprint: a local path counts by its name, not by its place."""
        rules = asdict(self)
        if Path(self.path).expanduser().exists():
            rules["path"] = Path(self.path).name
        return rules

    def words(self) -> str:
        """The source in a few words."""
        part = f" from {self.begin:g} to {self.end:g}" if (self.begin, self.end) != (0.0, 1.0) else ""
        part += f" without lines {self.skip_lines!r}" if self.skip_lines else ""
        part += f" in normalization {self.normalization}" if self.normalization != "verbatim" else ""
        part += f", share {self.share:g}" if self.share != 1 else ""
        path = Path(self.path).expanduser()
        if path.suffix in PLAIN or (path.is_dir() and any(f.suffix in PLAIN for f in path.iterdir())):
            return f"{self.path}{part or ' verbatim'}"
        name = f" {self.name}" if self.name else ""
        limit = f", first {self.limit_documents}" if self.limit_documents else ""
        return f"{self.path}{name} [{self.split}] field {self.field}{limit}, joined with {self.join!r}{part}"


WIKITEXT2 = TextSource("Salesforce/wikitext", "wikitext-2-raw-v1")
WIKITEXT2_TEST = TextSource("Salesforce/wikitext", "wikitext-2-raw-v1", "test")


def read_text(source: TextSource) -> str:
    """Read a source and join its documents.

    Returns:
        The text; for a single plain text file its bytes exactly, decoded as UTF-8.

    Raises:
        LitBinqError: no such file or data set, no such column, text that is not UTF-8, or only white space.
    """
    path = Path(source.path).expanduser()
    if path.exists():
        documents = _local_documents(source, path)
    elif source.path.startswith(("/", ".", "~")) or path.suffix in (*PLAIN, *ROWS):
        raise LitBinqError(
            f"text {source.path!r}: no such file or folder; expected a local file or a hub data set "
            "(owner/name): check the option `path`"
        )
    else:
        documents = _hub_documents(source)
    text = source.join.join(islice(documents, source.limit_documents))
    if not text.strip():
        raise LitBinqError(
            f"text {source.path!r} is empty; expected text: check the options `path`, `split` and `field`"
        )
    if source.skip_lines:
        skip = re.compile(source.skip_lines)
        text = "".join(line for line in text.splitlines(keepends=True) if not skip.match(line))
    text = text[_line_start(text, source.begin) : _line_start(text, source.end)]
    return normalize(text, source.normalization)


def _line_start(text: str, share: float) -> int:
    """Where the first line behind a share of the characters begins; the ends of the text are their own."""
    at = round(share * len(text))
    return at if at in (0, len(text)) else text.find("\n", at) + 1 or len(text)


def _local_documents(source: TextSource, path: Path) -> Iterable[str]:
    """The documents of a file, or of the files of a folder in order of their names."""
    known = (*PLAIN, *ROWS)
    inside = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [f for f in inside if f.suffix in known or f == path]
    if skipped := [f.name for f in inside if f not in files]:
        log.warning(
            "text %r: %d of %d entries are no %s files and are left out (first: %s)",
            *(source.path, len(skipped), len(inside), ", ".join(known), skipped[0]),
        )
    kinds = {"plain text" if f.suffix in PLAIN else f.suffix for f in files}
    if len(kinds) != 1 or files[0].suffix not in known:
        found = f"files of several types ({', '.join(sorted(kinds))})" if len(kinds) > 1 else "nothing of a known type"
        raise LitBinqError(
            f"text {source.path!r}: found {found}; expected files of one type of {', '.join(known)}: "
            "check the option `path`"
        )
    if files[0].suffix in PLAIN:
        return (_read_exactly(f) for f in files)
    builder = ROWS[files[0].suffix]
    # Streaming reads the files where they are; otherwise a copy of them would be made in the cache.
    rows = _load(source, builder, data_files=[str(f) for f in files], split="train", streaming=True)
    return _fields(source, rows)


def _read_exactly(path: Path) -> str:
    """A file's bytes as text. The text builder of `datasets` would rewrite CR LF."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise LitBinqError(
            f"text {str(path)!r}: byte {error.start} is not UTF-8; expected UTF-8 text: convert the file"
        ) from error


def _hub_documents(source: TextSource) -> Iterable[str]:
    rows = _load(source, source.path, source.name, split=source.split, streaming=source.limit_documents is not None)
    return _fields(source, rows)


def _load(source: TextSource, *args: Any, **options: Any) -> Any:
    """datasets.load_dataset with one-line errors."""
    # Imported here: a plain text file needs neither the library nor the seconds that its import takes.
    from datasets import load_dataset

    try:
        rows = load_dataset(*args, **options)
    except Exception as error:  # the library raises its own, the hub's, fsspec's and pyarrow's kinds
        raise LitBinqError(
            f"text {source.path!r} (name {source.name}, split {source.split}) cannot be loaded "
            f"({first_line(error)}); expected a local file or a hub data set: check the options `path`, "
            "`name` and `split`, and the network"
        ) from error
    return rows


def _fields(source: TextSource, rows: Any) -> Iterable[str]:
    """The text column, row by row; a null counts as an empty document."""
    try:
        for row in rows:
            if source.field not in row:
                raise LitBinqError(
                    f"text {source.path!r}: no column {source.field!r}, expected one of "
                    f"{', '.join(map(repr, row))}: set the option `field`"
                )
            value = row[source.field]
            if not isinstance(value, str | None):
                raise LitBinqError(
                    f"text {source.path!r}: column {source.field!r} holds {type(value).__name__}, "
                    "expected text: set the option `field`"
                )
            yield value or ""
    except LitBinqError:
        raise
    except Exception as error:  # a damaged file is noticed only while streaming; see _load for the kinds
        raise LitBinqError(f"text {source.path!r} cannot be read ({first_line(error)}); check the file") from error


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Tokenize a whole text, however long, without special tokens: (number of tokens,) int64."""
    # verbose=False: the text may well be longer than the model's context, it is cut into windows afterwards.
    ids = tokenizer(text, add_special_tokens=False, truncation=False, padding=False, verbose=False).input_ids
    return torch.tensor(ids, dtype=torch.int64)


def make_windows(ids: Tensor, length: int, count: int | None, *, take: Take = "first", seed: int = 0) -> Tensor:
    """Cut ids into windows that do not overlap and choose some.

    Args:
        ids: (number of tokens,) int64.
        length: T.
        count: how many windows; fewer are returned where the text is too short. None: all there are.
        take: "first" in order, or "random" choice in random order (by `seed` alone).
        seed: of the random choice.

    Returns:
        (n, T) int64 with 1 <= n <= count.

    Raises:
        LitBinqError: not even one window, or a length or count below 1.
    """
    if length < 1 or (count is not None and count < 1):
        raise LitBinqError(f"windows: got length {length} and count {count}, expected at least 1 of both")
    available = len(ids) // length
    if available == 0:
        raise LitBinqError(
            f"text too short: got {len(ids)} tokens, expected at least {length}; "
            "lower window_length (eval_length for evaluation) or give more text"
        )
    windows = ids[: available * length].reshape(available, length)
    count = available if count is None else min(count, available)
    if take == "first":
        return windows[:count].clone()
    return windows[torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count]]
