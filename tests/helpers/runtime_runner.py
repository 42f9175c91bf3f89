"""Run an exported folder under another ONNX Runtime: started by test_runtimes.py in an environment of its own.

    python runtime_runner.py FOLDER LOGITS.npz generic|auto native|unmodified

Prints one JSON object: version, route, and for each way to read the text the largest difference of the logits over the
largest logit. Imports neither torch nor transformers.
"""

import json
import logging
import sys

import numpy as np
import onnxruntime

from lit_binq_onnx.runtime.session import OnnxModel, positions


def main() -> None:
    folder, expected_file, route, way = sys.argv[1:]
    logging.basicConfig(level=logging.WARNING)
    stored = np.load(expected_file)
    ids, expected = stored["ids"], stored["logits"]
    n = ids.shape[1]
    model = OnnxModel(folder, native=way == "native", mode="exact", threads=1, route=route)
    steps = [(i, i + 1) for i in range(20, 30)]
    readings = {"prompt": [(0, n)], "two parts": [(0, 17), (17, n)], "decode": [(0, 20), *steps, (30, n)]}
    report = {"version": onnxruntime.__version__, "route": model.route}
    for name, parts in readings.items():
        worst = 0.0
        for rows in (1, 1, len(ids)):  # twice: plans of memory are made in the first run of a shape
            past, found = model.empty_past(rows), []
            for start, end in parts:
                mask = np.ones((rows, end), np.int64)
                logits, past = model.forward(ids[:rows, start:end], mask, positions(mask)[:, start:end], past)
                found.append(logits.copy())
            got = np.concatenate(found, axis=1)
            worst = max(worst, float(np.abs(got - expected[:rows]).max() / np.abs(expected).max()))
        report[name] = worst
    print(json.dumps(report))


main()
