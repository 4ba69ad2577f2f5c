# make quickstart | make test | make lint | make clean

PYTHON ?= python3
VENV ?= .venv
SEED ?= 0
BIN := $(VENV)/bin
# torch is installed first, in its own step: a plain `torch` that other packages pull in may be a
# CUDA build of several GB. Without a GPU, TORCH_ARGS can name pytorch.org's CPU index.
TORCH ?= $(if $(shell command -v nvidia-smi),torch>=2.11,torch==2.13.0)
TORCH_ARGS ?=

.PHONY: quickstart test lint clean

$(BIN)/.torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rloo_fast needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq --upgrade pip
	$(BIN)/pip install -qq $(TORCH_ARGS) "$(TORCH)"
	@touch $@

$(BIN)/.package: $(BIN)/.torch pyproject.toml
	$(BIN)/pip install -qq --editable .
	@touch $@

$(BIN)/.dev: $(BIN)/.package
	$(BIN)/pip install -qq --editable ".[test,lint]"
	@touch $@

quickstart: $(BIN)/.package
	$(BIN)/rloo-fast quickstart --seed $(SEED) --output_dir runs/quickstart

test: $(BIN)/.dev
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(BIN)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) build *.egg-info
