# make demo    everything once, on a real model: fetch, calibrate (three planes, one bit beside; with a GPU one bit with
#              the full recipe), export, check, write text, measure
# make test    every behaviour once, in minutes;  make test-all   and the tables of shapes, kernels and kinds
# make lint    ruff, mypy and the layers;  make docs   the documentation into build/docs
# make fuzz    the native operators built with sanitizers: the kernels' own test, then random and broken nodes, in a
#              runtime of ours and through ONNX Runtime's sessions. FUZZ and SESSIONS say how many, SEED where they begin
#
# Both start on a machine with Python 3.11 and a C++17 compiler and install into .venv.

PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
MODEL := $(DEMO)/source/SmolLM2-135M-Instruct
CONFIG := configs/smollm2-135m-demo.yaml
ONE_BIT := configs/smollm2-135m-demo-1bit.yaml
GPU := configs/smollm2-135m-demo-gpu.yaml
READY := .venv/ready

FUZZ ?= 30000
SESSIONS ?= 1000
SEED ?= 1
SANITIZED := build/sanitized

.PHONY: demo demo-cpu demo-gpu demo-source demo-run test test-all lint docs fuzz install clean
install: $(READY)

# torch first: with the constraints file the machine's own choice of build is kept.
$(READY): pyproject.toml constraints.txt $(shell find export/csrc -type f)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt cmake ninja scikit-build-core
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $(READY)

demo: $(READY)
	@if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then \
	  echo "A GPU is here: one bit with the full recipe ($(GPU)); make demo-cpu makes three planes"; $(MAKE) demo-gpu; \
	else $(MAKE) demo-cpu; fi

demo-cpu: demo-source
	$(BIN)/litbinq fit --config $(CONFIG)
	$(BIN)/litbinq fit --config $(ONE_BIT)
	$(MAKE) demo-run RECIPE="--recipe $(CONFIG) --baseline $(ONE_BIT)"

demo-gpu: demo-source
	$(BIN)/litbinq fit --config $(GPU)
	$(MAKE) demo-run RECIPE="--recipe $(GPU)"

demo-source: $(READY)
	$(BIN)/litbinq demo fetch --out $(DEMO)/source
	$(BIN)/litbinq demo convert --model $(MODEL).Q4_1.gguf --out $(MODEL)

demo-run:
	rm -rf $(DEMO)/onnx
	$(BIN)/litbinq export $(DEMO)/packed $(DEMO)/onnx
	$(BIN)/litbinq generate $(DEMO)/onnx --prompt "The history of the city begins" --max_new_tokens 32
	$(BIN)/litbinq generate $(DEMO)/onnx --prompt "The capital of France is" --max_new_tokens 32
	$(BIN)/litbinq generate $(DEMO)/onnx --prompt "In mathematics, a prime number is" --max_new_tokens 32
	$(BIN)/litbinq demo summarize $(RECIPE) --onnx $(DEMO)/onnx --out $(DEMO)/summary.json

test: $(READY)
	LIT_BINQ_REQUIRE_NATIVE=1 $(BIN)/python -m pytest -q -n 2 -m "not slow"

test-all: test
	LIT_BINQ_REQUIRE_NATIVE=1 $(BIN)/python -m pytest -q -n 2 -m slow

docs: $(READY)
	$(BIN)/python -m pip install -q -c constraints.txt mkdocs-material 'mkdocstrings[python]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=export $(BIN)/lint-imports

# An allocation of more than a gigabyte is a fault: no model here has as much. Python and ONNX Runtime leak by design.
fuzz: $(READY)
	$(BIN)/cmake -S export/csrc -B $(SANITIZED) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DLIT_BINQ_SANITIZE=ON
	$(BIN)/cmake --build $(SANITIZED) --target kernel_test operator_fuzz lit_binq_ops
	$(SANITIZED)/kernel_test
	ASAN_OPTIONS=max_allocation_size_mb=1024:malloc_context_size=8 $(SANITIZED)/operator_fuzz --count $(FUZZ) --seed $(SEED)
	LIT_BINQ_OPS=$(SANITIZED)/liblit_binq_ops.so OMP_NUM_THREADS=1 \
	ASAN_OPTIONS=detect_leaks=0:malloc_context_size=2:quarantine_size_mb=16 \
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	$(BIN)/python tests/helpers/session_fuzz.py --count $(SESSIONS) --seed $(SEED)

clean:
	rm -rf .venv build runs
