"""`python genai_mode.py FOLDER MODE`: the logits of a prompt in onnxruntime-genai, the mode written into its file."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime_genai as og

folder, mode = Path(sys.argv[1]), sys.argv[2]
path = folder / "genai_config.json"
config = json.loads(path.read_text())
config["model"]["decoder"]["session_options"]["lit_binq.mode"] = mode
config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = 1
path.write_text(json.dumps(config))
model = og.Model(str(folder))
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=12)
generator = og.Generator(model, parameters)
generator.append_tokens(np.arange(9) + 60)
print(*np.asarray(generator.get_logits()).ravel().tolist())
