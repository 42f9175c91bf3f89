"""What tests of `litbinq compare` share: a plan's files, and a stand-in for the fits."""

import json
from pathlib import Path

import yaml

BASE = {
    "model": {"model": "model.gguf", "packed": "p", "closed_form": {"objective": "true_target", "shrinkage": 0.1}},
    "data": {"train": {"path": "train.txt"}, "evaluation": {"wiki": {"path": "wiki.txt"}, "c4": {"path": "c4.txt"}}},
    "checkpoint": {"dirpath": "c"},
    "results": "r.json",
    "ckpt_path": "left/over.ckpt",
}
ROWS = {
    "weight": {"model.closed_form.objective": "weight"},
    "true target": {"model": {"closed_form": {"shrinkage": 0.3}}},
}


def write(**keys) -> str:
    """A comparison's YAML file."""
    given = {"base": "base.yaml", "out": "out", "rows": ROWS} | keys
    Path("compare.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    return "compare.yaml"


class Fits:
    """Stands in for `litbinq fit`: perplexity 100 + 10 x seed, twice that for the row `weight`; c4 ten times."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.measured: list[str] = []
        self.broken: dict[str, tuple[int, str]] = {}

    def __call__(self, options: Path, output: Path) -> int:
        given = yaml.safe_load(options.read_text())
        row = options.parent.parent.name
        self.seen.append(f"{row}/{given['seed_everything']}")
        for name in ("packed", "checkpoint"):
            (options.parent / name).mkdir()
        if row in self.broken:
            code, said = self.broken[row]
            output.write_text(said)
            return code
        output.write_text("wrote it\n")
        packed = (100 + 10 * given["model"]["seed"]) * (2 if row == "weight" else 1)
        perplexity = {"wiki": {"packed": packed}, "c4": {"packed": 10 * packed}}
        if given["model"]["compare_fp"]:
            self.measured.append(row)
            for name, value in (("wiki", 25.0), ("c4", 40.0)):
                perplexity[name]["fp"] = value
        results = {
            "model": given["model"]["model"],
            "true_bits": 1.046,
            "file_bits": 4.41,
            "perplexity": perplexity,
            "data": "calibration: train.txt; fingerprint 1\nevaluation: wiki.txt",
            "calibration_tokens": 124928,
            "calibration_seconds": 35.0 + given["model"]["seed"],
            "calibration_peak_memory": {"host_bytes": 3_900_000_000, "device_bytes": None},
            "device": "a device",
            "versions": {"torch": "2.13.0"},
        }
        Path(given["results"]).write_text(json.dumps(results))
        return 0


def lines_of(table: str) -> dict[str, list[str]]:
    """Cells by the row's name."""
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1
    return {row[0]: row[1:] for row in rows}
