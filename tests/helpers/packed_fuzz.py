"""A fuzzer of the packed folder's reader: `PYTHONPATH=tests python tests/helpers/packed_fuzz.py --runs 1000 --seed 0`.

One run damages one or more files of a small packed folder and reads it. Either LitBinqError is raised, with one line,
or the model holds what the files say: its tensors are compared with the weights file as this program reads it. Any
other exception, a run of more than 20 seconds of the processor and one that wants more than 2 GiB are findings; their
folders are kept under `--keep`. Many runs are faster with TMPDIR=/dev/shm.
"""

import argparse
import collections
import copy
import json
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from conftest import byte_tokenizer
from torch import nn

from formats import packed_variant
from lit_binq.errors import LitBinqError
from lit_binq.formats.manifest import read_manifest
from lit_binq.hub import reader as packed_reader
from lit_binq.hub.reader import read_model
from lit_binq.hub.save_load import load_packed, save_packed
from lit_binq.models.kv_cache import kv_bits, set_kv_bits

Files = dict[str, bytes]
WEIGHTS, MANIFEST, CONFIG = "model.safetensors", "lit_binq.json", "config.json"
DTYPES = {"U8": np.uint8, "I8": np.int8, "F16": np.float16, "F32": np.float32, "I64": np.int64, "BOOL": np.bool_}
ROOM = 2 << 30
WORDS = [
    "x",
    "float16",
    "float32",
    "bfloat16",
    "format",
    "row_column",
    "planes",
    "dense_only",
    "two_plane",
    "codes",
    "lm_head.weight",
    "model.norm.weight",
    "model.embed_tokens.weight",
    "F16",
    "F32",
    "U8",
    "I64",
    "F8_E4M3",
    "llama",
    "gpt2",
    "mamba",
    "eager",
    "sdpa",
    "flash_attention_2",
    "layer_types",
    "../x",
    "auto_map",
    "quantization_config",
    "fp8",
    "num_hidden_layers",
    "vocab_size",
    "rope_parameters",
    "dynamic",
    "yarn",
    "longrope",
    "tokenizer_class",
    "AutoTokenizer",
    "max_position_embeddings",
    "num_labels",
    "pruned_heads",
    "is_decoder",
]
WORDS += ["", "\n", "\x00", "é" * 70]
NUMBERS = (0, 1, -1, 2, 7, 8, 16, 255, 256, 4096, 65536, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 10**30)
NUMBERS += (-(2**63), 0.5, -0.5, 1e-300, 1e300, float("nan"), float("inf"), float("-inf"))


def seeds(folder: Path) -> list[Files]:
    """Files of small packed folders, of every format and of three architectures."""
    made = []
    for architecture, variant, rest, bits in (
        ("llama", "row_column", torch.float16, 0),
        ("opt", "planes-nested", torch.bfloat16, 4),
        ("qwen2", "mixed", torch.float32, 0),
        ("llama", "two_plane-3", torch.float16, 0),
    ):
        model = packed_variant(architecture, variant)
        blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
        if variant != "mixed":  # one block is as good as two, and faster
            del blocks[1:]
            model.config.num_hidden_layers = 1
            if getattr(model.config, "layer_types", None):
                model.config.layer_types = model.config.layer_types[:1]
        set_kv_bits(model, bits)
        place = folder / f"seed-{len(made)}"
        save_packed(model, byte_tokenizer(), place, facts={"made": "to be broken"}, unquantized_dtype=rest)
        made.append({f.name: f.read_bytes() for f in place.iterdir()})
    return made


# ---- damage --------------------------------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to every value inside a JSON value, the whole of it too."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def invented(rng: random.Random, root: Any) -> Any:
    """Some value: a number or word that is known to hurt, or what stands elsewhere in the file."""
    kind = rng.randrange(8)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind == 3:
        return rng.choice(WORDS)
    if kind == 4:
        return rng.choice((None, True, False, [], {}, [[]], {"": {}}, [0] * 9, {"format": "planes", "columns1": 3}))
    if kind == 5:
        return rng.randrange(-300, 300)
    return copy.deepcopy(at(root, rng.choice(places(root))))


def damage_json(rng: random.Random, value: Any) -> Any:
    """One change of structure."""
    root = json.loads(json.dumps(value))
    path = rng.choice(places(root)[1:] or [()])
    if not path:
        return invented(rng, root)
    owner, key = at(root, path[:-1]), path[-1]
    kind = rng.randrange(6)
    if kind < 3:
        inner = owner[key]
        if kind == 0 and isinstance(inner, (int, float)) and not isinstance(inner, bool):
            owner[key] = rng.choice((inner + 1, inner - 1, -inner, inner * 2, inner * 1000, float(inner), inner // 2))
        else:
            owner[key] = invented(rng, root)
    elif kind == 3:
        del owner[key]
    elif isinstance(owner, dict):
        new = rng.choice((*WORDS, *owner))
        owner[new] = owner[key] if kind == 4 else invented(rng, root)
        if kind == 4 and rng.random() < 0.5 and new != key:
            del owner[key]
    else:
        owner.insert(rng.randrange(len(owner) + 1), invented(rng, root))
    return root


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """One change of bytes."""
    data = bytearray(data)
    i, j = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    kind = rng.randrange(6)
    if kind == 0 and data:
        for _ in range(rng.choice((1, 1, 1, 4, 20))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[i : min(j, i + rng.choice((1, 8, 200, len(data))))]
    elif kind == 2:
        data[i:i] = data[i : min(j, i + 64)]
    elif kind == 3:
        data[i:i] = rng.choice(
            (b"\x00", b"\xff" * 8, b"9" * 30, b"[" * 3000, b'{"a":' * 2000, b'"', b"\xed\xa0\x80", b"-", b"e9")
        )
    elif kind == 4:
        del data[i:]
    elif data:
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def damage_header(rng: random.Random, data: bytes) -> bytes:
    """One change of a safetensors file's header, its length kept right, mostly."""
    (length,) = struct.unpack("<Q", data[:8])
    text, body = data[8 : 8 + length], data[8 + length :]
    kind = rng.randrange(4)
    if kind == 0:
        text = damage_bytes(rng, text)
    else:
        header = damage_json(rng, json.loads(text))
        if kind == 1 and isinstance(header, dict) and (names := [n for n in header if n != "__metadata__"]):
            one, two = rng.choice(names), rng.choice(names)  # tensors that are each other
            header[one], header[two] = header[two], header[one]
        text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    shown = len(text) if rng.random() < 0.95 else rng.choice((0, 1, len(text) + 8, 2**40, 2**63, 2**64 - 1))
    return struct.pack("<Q", shown) + text + body


def damage(rng: random.Random, files: Files, *, others: bool) -> tuple[Files, set[str]]:
    """Damaged files, and the names of those that are."""
    files, touched = dict(files), set()
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        names = [MANIFEST] * 5 + [CONFIG] + [WEIGHTS] * 5
        if others:
            names = [n for n in files if n not in (MANIFEST, CONFIG, WEIGHTS)] * 3 + [CONFIG]
        name = rng.choice(names)
        data = files[name]
        if rng.random() < 0.01:
            data = b""
        elif name == WEIGHTS and rng.random() < 0.7 and len(data) > 8 and struct.unpack("<Q", data[:8])[0] < len(data):
            try:
                data = damage_header(rng, data)
            except (ValueError, RecursionError):  # not JSON any more
                data = damage_bytes(rng, data)
        elif name.endswith(".json") and rng.random() < 0.75:
            try:
                data = json.dumps(damage_json(rng, json.loads(data))).encode("utf-8", "surrogatepass")
            except (ValueError, RecursionError):
                data = damage_bytes(rng, data)
        else:
            data = damage_bytes(rng, data)
        files[name] = data
        touched.add(name)
    return files, touched


# ---- speed ---------------------------------------------------------------------------------------------------------


class Built:
    """Models of configurations that are as they were: made once, and handed out anew each time.

    Building takes ten times as long as everything else of a run, and cannot depend on the other files.
    """

    def __init__(self) -> None:
        self.from_config, self.read_configuration = packed_reader._from_config, packed_reader.read_configuration
        self.configs: dict[bytes, Any] = {}
        self.models: dict[tuple[int, bool], nn.Module] = {}
        self.linears: dict[int, dict[str, nn.Module]] = {}
        packed_reader._from_config, packed_reader.read_configuration = self.model, self.configuration

    def keep(self, folder: Path) -> None:
        """Take up the configuration of an unharmed folder."""
        config = self.read_configuration(folder)
        self.configs[(folder / CONFIG).read_bytes()] = config
        for meta in (True, False):
            with torch.device("meta" if meta else "cpu"):
                model = self.models[id(config), meta] = self.from_config(copy.deepcopy(config))
            self.linears[id(model)] = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}

    def configuration(self, folder: Path) -> Any:
        kept = self.configs.get((folder / CONFIG).read_bytes())
        return self.read_configuration(folder) if kept is None else _Known(kept)

    def model(self, config: Any) -> nn.Module:
        if not isinstance(config, _Known):
            return self.from_config(config)
        if torch.empty(0).device.type != "meta":
            return copy.deepcopy(self.models[id(config.config), False])
        skeleton = self.models[id(config.config), True]  # of which only linears are exchanged
        for name, linear in self.linears[id(skeleton)].items():
            skeleton.set_submodule(name, linear)
        return skeleton


class _Known:
    """A configuration that models are kept of; a copy of it is itself."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __deepcopy__(self, memo: Any) -> "_Known":
        return self


# ---- what must hold ------------------------------------------------------------------------------------------------


def plain_tensors(data: bytes) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, floating-point ones as float32; read by nothing of ours or of theirs."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        if entry["dtype"] == "BF16":
            raw = np.frombuffer(body[start:end], np.uint16).astype(np.uint32) << 16
            tensor = raw.view(np.float32)
        else:
            tensor = np.frombuffer(body[start:end], DTYPES[entry["dtype"]])
        tensors[name] = tensor.reshape(entry["shape"])
    return tensors


def require_what_the_files_say(model: nn.Module, files: Files) -> None:
    """Every stored tensor is in the model, bit for bit, and every other of the model's is tied to one."""
    stored, manifest = plain_tensors(files[WEIGHTS]), json.loads(files[MANIFEST])
    state = model.state_dict()
    assert state.keys() - stored.keys() == set(manifest["tied"]), "names"
    for name, tensor in stored.items():
        mine = state[name].numpy()
        wanted = tensor.astype(mine.dtype)
        assert mine.shape == wanted.shape, name
        assert np.array_equal(mine, wanted, equal_nan=wanted.dtype.kind == "f"), name
    for name, kept in manifest["tied"].items():
        assert state[name].data_ptr() == state[kept].data_ptr(), name
    assert kv_bits(model) == manifest.get("kv_bits", 0), "kv_bits"
    layers = {n: m.kind for n, m in model.named_modules() if hasattr(m, "weight_buffers")}
    assert layers == {n: entry["format"] for n, entry in manifest["linears"].items()}, "formats"


WRITTEN: Files = {}
"""What the folder holds."""


class TooLong(BaseException):
    """A run that does not end."""


def too_long(*_: Any) -> None:
    raise TooLong


def run(folder: Path, files: Files, *, others: bool) -> str:
    """Read a folder. Returns `read` or the kind of error; raises what nothing may raise."""
    for name, data in files.items():
        if WRITTEN.get(name) != data:
            (folder / name).write_bytes(data)
            WRITTEN[name] = data
    signal.setitimer(signal.ITIMER_PROF, 20)
    try:
        model = load_packed(folder)[0] if others else read_model(folder, read_manifest(folder))
    except LitBinqError as error:
        text = str(error)
        assert "\n" not in text, "an error of several lines"
        assert len(text) < 900, "an error of many words"
        return " ".join(text.replace(str(folder), "").split()[3:7])
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    require_what_the_files_say(model, files)
    return "read"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=None, help="folder for what was found")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    signal.signal(signal.SIGPROF, too_long)
    seen, found = collections.Counter(), collections.Counter()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        bases = seeds(Path(place))
        folder = Path(place) / "broken"
        folder.mkdir()
        built = Built()
        for base in bases:
            assert run(folder, base, others=True) == "read"
            built.keep(folder)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
        for number in range(options.runs):
            rng = random.Random(f"{options.seed}-{number}")
            others = rng.random() < 0.02
            base = rng.choice(bases)
            files, _ = damage(rng, base, others=others)
            for leftover in WRITTEN.keys() - files.keys():
                (folder / leftover).unlink()
                del WRITTEN[leftover]
            try:
                seen[run(folder, files, others=others)] += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                last = traceback.extract_tb(error.__traceback__)[-1]
                kind = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {str(error)[:100]!r}"
                found[kind] += 1
                if found[kind] == 1:
                    print(f"run {number}: {kind}", flush=True)
                    if options.verbose:
                        traceback.print_exc()
                    if options.keep is not None:
                        shutil.copytree(folder, options.keep / f"{options.seed}-{number}", dirs_exist_ok=True)
            if (number + 1) % 5000 == 0:
                rate = (number + 1) / (time.monotonic() - began)
                print(f"{number + 1} runs, {rate:.0f} a second, {sum(found.values())} findings", flush=True)
    read, errors = seen.pop("read", 0), sum(seen.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    how = f"{read} read, {errors} refused in {len(seen)} ways, {sum(found.values())} findings; at most {peak} MiB"
    print(f"{options.runs} runs in {time.monotonic() - began:.0f} s: {how}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
