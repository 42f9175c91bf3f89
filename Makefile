# make demo    everything once, on a real model: fetch, calibrate (three planes; one bit beside), export, check,
#              write text, measure
# make test    the tests;  make lint   ruff and mypy
#
# Both start on a machine with Python 3.11 and a C++17 compiler and install into .venv.

PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
MODEL := $(DEMO)/source/SmolLM2-135M-Instruct
CONFIG := configs/smollm2-135m-demo.yaml
ONE_BIT := configs/smollm2-135m-demo-1bit.yaml
READY := .venv/ready

.PHONY: demo test lint install clean
install: $(READY)

# torch first: with the constraints file the machine's own choice of build is kept.
$(READY): pyproject.toml constraints.txt $(wildcard export/csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt cmake ninja scikit-build-core
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/python -m lit_binq.demo fetch --out $(DEMO)/source
	$(BIN)/python -m lit_binq.demo convert --model $(MODEL).Q4_1.gguf --out $(MODEL)
	$(BIN)/litbinq fit --config $(CONFIG)
	$(BIN)/litbinq fit --config $(ONE_BIT)
	rm -rf $(DEMO)/onnx
	$(BIN)/litbinq export $(DEMO)/packed $(DEMO)/onnx
	$(BIN)/litbinq generate $(DEMO)/onnx --prompt "The history of the city begins" --max_new_tokens 32
	$(BIN)/litbinq generate $(DEMO)/onnx --prompt "The capital of France is" --max_new_tokens 32
	$(BIN)/litbinq generate $(DEMO)/onnx --prompt "In mathematics, a prime number is" --max_new_tokens 32
	$(BIN)/python -m lit_binq.demo summarize --recipe $(CONFIG) --beside $(ONE_BIT) --onnx $(DEMO)/onnx --out $(DEMO)/summary.json

test: $(READY)
	LIT_BINQ_REQUIRE_NATIVE=1 $(BIN)/python -m pytest -q -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build runs
