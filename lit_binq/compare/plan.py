"""What `litbinq compare` is to do, read from one YAML file.

    base: configs/smollm2-135m-s.yaml         # options of `litbinq fit`, for every row
    out: runs/compare/ladder                  # folder of the table; every row has a folder in it
    common: {model.tuning.epochs: 0}          # options that differ from the base, for every row
    rows:                                     # the methods: options that differ from base and common
      weight: {model.closed_form.objective: weight}
      true target:
        model.closed_form: {objective: true_target, shrinkage: 0.1}
    seeds: [0, 1, 2]                          # each row once a seed (model.seed, seed_everything); default [0]
    keep: false                               # remove packed folder and checkpoint of a finished row; default true
    references:                               # rows that were measured elsewhere; default none
      - {name: Q2_K, true_bits: 2.93, ratio: {wikitext2: 2.24}, source: 'llama.cpp, 8 windows'}

Options are merged in the order base, common, row. Keys may be dotted (`model.tuning.epochs: 0`) or nested, one option
once. A mapping merges with what it meets, but a mapping with `class_path` replaces it whole; everything else replaces.
Paths are relative to where the command is run, as in `litbinq fit`.

"""

# Knows nothing of torch, so that a wrong plan is refused at once. The text above is also what
# `litbinq compare --help` shows.

import hashlib
import json
import re
from collections.abc import Hashable
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from lit_binq.errors import LitBinqError

Options = dict[str, Any]

SET_HERE = {
    "model.packed": "every row has its own",
    "checkpoint.dirpath": "every row has its own",
    "results": "every row has its own",
    "evaluate": "a table needs it",
    "ckpt_path": "every row starts anew",
    "model.seed": "use the key `seeds`",
    "seed_everything": "use the key `seeds`",
}
"""Options of `litbinq fit` that the comparison sets itself, with the reason."""

LITERAL = ("data", "evaluation")
"""Below this option keys are names of corpora; dots in them are dots."""


@dataclass
class Reference:
    """A row that was measured elsewhere.

    Attributes:
        name: of the method.
        source: where the figures come from, and on what they were measured.
        true_bits: stored bits of the weights inside the blocks, for each of them.
        file_bits: bits of the whole file a parameter.
        perplexity: by corpus.
        ratio: perplexity over full precision's, by corpus.
        seconds: of calibration.
    """

    name: str
    source: str
    true_bits: float | None = None
    file_bits: float | None = None
    perplexity: dict[str, float] = field(default_factory=dict)
    ratio: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None


@dataclass(frozen=True)
class Run:
    """One fit: a row with one seed.

    Attributes:
        row: name of the row.
        seed: the seed.
        folder: everything of this run lies in it.
        options: of `litbinq fit`, complete but for places.
        digest: of the options and the content of the files they name; another digest means another run.
        fp_digest: the same of what decides full precision's perplexity; None if it is not to be measured.
    """

    row: str
    seed: int
    folder: Path
    options: Options = field(repr=False, compare=False)
    digest: str = ""
    fp_digest: str | None = None

    @property
    def corpora(self) -> list[str]:
        """Names of the evaluation sets; the data module's own default if none is given."""
        given = self.options.get("data", {}).get("evaluation")
        return ["wikitext2"] if given is None else list(given)


@dataclass
class Plan:
    """A whole comparison.

    Attributes:
        path: the YAML file.
        out: folder of the table.
        runs: in the order of the table, the seeds of a row together.
        references: rows measured elsewhere.
        keep: whether packed folders and checkpoints stay.
    """

    path: Path
    out: Path
    runs: list[Run]
    references: list[Reference]
    keep: bool = True

    @property
    def rows(self) -> dict[str, list[Run]]:
        """The runs of each row."""
        rows: dict[str, list[Run]] = {}
        for run in self.runs:
            rows.setdefault(run.row, []).append(run)
        return rows

    @property
    def corpora(self) -> list[str]:
        """Every evaluation set of any row, in order of appearance."""
        return list(dict.fromkeys(name for run in self.runs for name in run.corpora))


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice, and takes 1e-3 for a number as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key in keys:
            if keys.count(key) > 1:
                raise LitBinqError(f"line {node.start_mark.line + 1}: key {key!r} is given twice, expected once")
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_yaml(path: Path) -> Options:
    """Read a YAML file that holds a mapping.

    Raises:
        LitBinqError: no such file, no YAML, a key given twice, or something else than a mapping.
    """
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise LitBinqError(f"{str(path)!r}: cannot be read ({reason}), expected a YAML file of options") from error
    except LitBinqError as error:
        raise LitBinqError(f"{str(path)!r}: {error}") from None
    except yaml.YAMLError as error:
        raise LitBinqError(f"{str(path)!r}: not YAML ({' '.join(str(error).split())})") from error
    return _mapping(value, str(path))


def _mapping(value: Any, where: str) -> Options:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise LitBinqError(f"{where}: got {value!r:.80}, expected a mapping with text for keys")
    return value


def expand(options: Options, where: str, above: tuple[str, ...] = ()) -> Options:
    """Options with dotted keys as nested mappings.

    Args:
        options: dotted keys, nested mappings, or both.
        where: for error messages.
        above: keys that lead here.

    Raises:
        LitBinqError: an option is given twice, or both as a value and as a mapping.
    """
    tree: Options = {}
    for key, value in _mapping(options, where).items():
        parts = (key,) if above[: len(LITERAL)] == LITERAL else tuple(key.split("."))
        if not all(parts):
            raise LitBinqError(f"{where}: option {key!r}, expected names with single dots between them")
        if isinstance(value, dict):
            value = expand(value, where, above + parts)
        for part in reversed(parts):
            value = {part: value}
        _join(tree, value, where, above)
    return tree


def _join(tree: Options, more: Options, where: str, above: tuple[str, ...]) -> None:
    """Put `more` into `tree`; no option may be in both."""
    for key, value in more.items():
        if key not in tree:
            tree[key] = value
        elif isinstance(tree[key], dict) and isinstance(value, dict):
            _join(tree[key], value, where, (*above, key))
        else:
            raise LitBinqError(f"{where}: option {'.'.join((*above, key))} is given twice, expected once")


def merge(under: Options, over: Options) -> Options:
    """`under` with the options of `over`; see the file's head for the rule. Neither is changed."""
    merged = dict(under)
    for key, value in over.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict) and "class_path" not in value
        merged[key] = merge(old, value) if both else value  # type: ignore[arg-type]  # `both` says that it is a dict
    return merged


def get(options: Options, dotted: str, default: Any = None) -> Any:
    """The option `dotted` of nested options, or the default."""
    value: Any = options
    for part in dotted.split("."):
        if not isinstance(value, dict) or part not in value:
            return default
        value = value[part]
    return value


@lru_cache(maxsize=256)
def _content(path: str) -> str | None:
    """Digest of a local file's or folder's content; None for anything else, such as a hub id."""
    place = Path(path).expanduser()
    if place.is_file():
        with place.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not place.is_dir():
        return None
    digest = hashlib.sha256()
    for file_path in sorted(f for f in place.rglob("*") if f.is_file()):
        digest.update(f"{file_path.relative_to(place)} {_content(str(file_path))}\n".encode())
    return digest.hexdigest()


def _digest(options: Options) -> str:
    """16 hex digits over options and the content of the local files they name under `model` or `path`."""
    named: list[str] = []

    def collect(value: Any) -> None:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(inner, (dict, list)):
                collect(inner)
            elif key in ("model", "path") and isinstance(inner, str):
                named.append(inner)

    collect(options)
    contents = {path: _content(path) for path in named}
    return hashlib.sha256(json.dumps([options, contents], sort_keys=True, default=str).encode()).hexdigest()[:16]


def _fp_digest(options: Options) -> str | None:
    if get(options, "model.compare_fp", True) is False:
        return None
    names = ("model.model", "model.revision", "data.evaluation", "data.eval_windows", "data.eval_length")
    return _digest({"model": get(options, names[0]), **{name: get(options, name) for name in names[1:]}})


def read_plan(path: Path) -> Plan:
    """Read and check a comparison.

    Raises:
        LitBinqError: a file that cannot be read, an unknown or contradictory key, or a value of the wrong kind.
    """
    _content.cache_clear()  # within one plan a file is read once; between two it may change
    given = load_yaml(path)
    known = ("base", "out", "common", "seeds", "rows", "keep", "references")
    for key in given:
        if key not in known:
            raise LitBinqError(f"{str(path)!r}: unknown key {key!r}, expected one of {', '.join(known)}")
    for key in ("base", "out"):
        if not isinstance(given.get(key), str):
            raise LitBinqError(f"{str(path)!r}: {key}: got {given.get(key)!r}, expected a path")
    if not isinstance(given.get("keep", True), bool):
        raise LitBinqError(f"{str(path)!r}: keep: got {given['keep']!r}, expected true or false")
    rows = _mapping(given.get("rows"), f"{str(path)!r}: rows")
    if not rows:
        raise LitBinqError(f"{str(path)!r}: rows: got none, expected at least one")
    base = expand(load_yaml(Path(given["base"])), f"{given['base']!r}")
    base.pop("ckpt_path", None)
    common = _differences(given.get("common"), f"{str(path)!r}: common")
    plan = Plan(path, Path(given["out"]), [], _references(given.get("references"), path), given.get("keep", True))
    folders: dict[str, str] = {}
    for name, row in rows.items():
        folder = folder_name(name)
        if not folder or folder in folders:
            other = f"those of row {folders[folder]!r}" if folder else "none"
            raise LitBinqError(f"{str(path)!r}: rows: {name!r} has the same letters and digits as {other}, expected "
                               "a name that makes a folder of its own")  # fmt: skip
        folders[folder] = name
        options = merge(merge(base, common), _differences(row, f"{str(path)!r}: rows: {name}"))
        for seed in _seeds(given.get("seeds", [0]), path):
            plan.runs.append(_run(name, seed, plan.out / folder / f"seed-{seed}", options))
    for reference in plan.references:
        for corpus in [*reference.perplexity, *reference.ratio]:
            if corpus not in plan.corpora:
                raise LitBinqError(
                    f"{str(path)!r}: references: {reference.name}: unknown corpus {corpus!r}, expected one of "
                    f"{', '.join(plan.corpora)}"
                )
    return plan


def _run(name: str, seed: int, folder: Path, options: Options) -> Run:
    options = merge(options, {"seed_everything": seed, "model": {"seed": seed}})
    places = {"results", "evaluate", "checkpoint"}
    kept = {key: value for key, value in options.items() if key not in places}
    fp_digest = _fp_digest(options)
    kept["model"] = {k: v for k, v in options["model"].items() if k != "packed"} | {"compare_fp": fp_digest is not None}
    return Run(name, seed, folder, options, _digest(kept), fp_digest)


def _differences(options: Any, where: str) -> Options:
    """The options of a row or of all, without those that the comparison sets itself."""
    tree = expand({} if options is None else options, where)
    for dotted, reason in SET_HERE.items():
        if get(tree, dotted, _run) is not _run:
            raise LitBinqError(f"{where}: {dotted} cannot be set here: {reason}")
    return tree


def _seeds(seeds: Any, path: Path) -> list[int]:
    good = isinstance(seeds, list) and seeds and all(type(s) is int and s >= 0 for s in seeds)
    if not good or len(set(seeds)) < len(seeds):
        raise LitBinqError(f"{str(path)!r}: seeds: got {seeds!r}, expected a list of different whole numbers >= 0")
    return seeds


def _references(given: Any, path: Path) -> list[Reference]:
    where = f"{str(path)!r}: references"
    if not isinstance(given, list | None):
        raise LitBinqError(f"{where}: got {given!r:.80}, expected a list of mappings")
    known = [f.name for f in fields(Reference)]
    references = []
    for entry in given or []:
        for key in _mapping(entry, where):
            if key not in known:
                raise LitBinqError(f"{where}: unknown key {key!r}, expected one of {', '.join(known)}")
        for key in ("name", "source"):
            if not isinstance(entry.get(key), str):
                raise LitBinqError(f"{where}: {key}: got {entry.get(key)!r}, expected text for every reference")
        numbers = [entry.get(key) for key in ("true_bits", "file_bits", "seconds")]
        for key in ("perplexity", "ratio"):
            numbers += _mapping(entry.get(key, {}), f"{where}: {entry['name']}: {key}").values()
        for number in numbers:
            if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
                raise LitBinqError(f"{where}: {entry['name']}: got {number!r}, expected a number")
        references.append(Reference(**entry))
    return references


def folder_name(row: str) -> str:
    """A row's name as a folder's: lower case, everything but letters, digits and `_` a hyphen."""
    return re.sub(r"[\W]+", "-", row.lower()).strip("-")
