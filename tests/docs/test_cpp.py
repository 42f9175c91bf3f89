"""The C++ program of the guide, built as the guide says where ONNX Runtime's headers are, writes what Python writes."""

import os
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from conftest import ROOT, byte_tokenizer

from documents import blocks
from exporting import export_onnx, fusable_model
from lit_binq_onnx.runtime.library import library_path
from lit_binq_onnx.runtime.session import OnnxModel

HEADERS = [Path(p) for p in (os.environ.get("ORT_INCLUDE"), "/usr/include/onnxruntime", "/usr/local/include") if p]
PROMPT, COUNT = [72, 101, 108, 108, 111], 8


def test_the_program_writes_the_same_tokens(tmp_path):
    include = next((p for p in HEADERS if (p / "onnxruntime_cxx_api.h").is_file()), None)
    if include is None:
        pytest.skip("no onnxruntime_cxx_api.h here (Debian 13: libonnxruntime-dev; or ORT_INCLUDE names its folder)")
    wheel = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    if not wheel:
        pytest.skip("this onnxruntime wheel has no libonnxruntime.so")
    if (library := library_path()) is None:
        pytest.skip("the operator library is not built")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):  # the wheel has the versioned name only
        (tmp_path / name).symlink_to(wheel[-1])
    for block in blocks(ROOT / "docs" / "guides" / "deploy-cpp.md"):
        if block.title:
            (tmp_path / block.title).write_text(block.text)
    build = tmp_path / "build"
    found = (f"-DORT_INCLUDE={include}", f"-DORT_LIBRARY={tmp_path / 'libonnxruntime.so'}")
    subprocess.run(["cmake", "-S", tmp_path, "-B", build, *found], check=True)
    subprocess.run(["cmake", "--build", build], check=True)

    folder = tmp_path / "onnx"
    export_onnx(fusable_model("llama"), byte_tokenizer(), folder, check=False)
    command = [build / "generate", folder, library, str(COUNT), *map(str, PROMPT)]
    ran = subprocess.run(command, env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr

    model, tokens = OnnxModel(folder, route="generic"), list(PROMPT)
    for _ in range(COUNT):
        n = len(tokens)
        ids, mask = np.array([tokens]), np.ones((1, n), np.int64)
        logits, _cache = model.forward(ids, mask, np.arange(n)[None], model.empty_past())
        tokens.append(int(logits[0, -1].argmax()))
    assert [int(word) for word in ran.stdout.split()] == tokens[len(PROMPT) :]
