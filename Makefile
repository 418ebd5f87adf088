# Every target sets up what it needs. A fresh machine needs Python 3.11 or newer, and make.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Only what is there: mypy takes a missing path or a folder without Python for an error.
TYPED = $(wildcard sam_jax train.py eval.py) $(sort $(dir $(wildcard configs/*.py benchmarks/*.py)))
# An environment is reused only while the interpreter and the pins are the same. A folder without
# this file was made by someone else, and is never deleted.
KEY := $(VENV)/.sam-jax-pins
METADATA_KEY := $(VENV)/.sam-jax-metadata
TORCH_KEY := $(VENV)/.sam-jax-torch-pins
TPU_COMPILER := $(VENV)/tpu-compiler

UV_VERSION := 0.13.9
UV_COMPILE = .venv-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --no-annotate \
  --no-emit-index-url --custom-compile-command "make lock" $(if $(UPGRADE),--upgrade) pyproject.toml

.DEFAULT_GOAL := help
.PHONY: check-python clean demo format help lint lock setup setup-torch setup-tpu-compiler test \
  test-lowest uv

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) JOBS=$(JOBS) PYTEST_ARGS=$(PYTEST_ARGS)"

demo: setup ## Train a tiny model on a CPU for some minutes, then evaluate it
	$(BIN)/python train.py --config configs/demo.py --workdir runs/demo
	$(BIN)/python eval.py --config configs/demo.py --checkpoint runs/demo

# The programs that tests start are compiled once, not at each start.
test: lint setup-torch setup-tpu-compiler ## Check style and types, then run every test
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

lint: setup ## Check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy $(TYPED)

format: setup ## Apply the formatter and the safe fixes
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

check-python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: there is no '$(PYTHON)'; install Python 3.11 or newer, or name it: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $$($(PYTHON) -V 2>&1) is too old, 3.11 is needed; name a newer one: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $$($(PYTHON) -V) has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

setup: check-python ## Create the environment that requirements.lock describes
	@set -e; \
	key="$$($(PYTHON) -VV | cat - requirements.lock | cksum)"; \
	if [ "$$key" = "$$(cat $(KEY) 2>/dev/null)" ]; then exit 0; fi; \
	if [ -e $(VENV) ] && [ ! -e $(KEY) ]; then \
	  echo "error: $(VENV) was not made by this Makefile; remove it, or use another: make VENV=..." >&2; exit 1; fi; \
	echo "Setting up $(VENV), about a minute"; \
	rm -rf $(VENV); mkdir -p $(VENV); echo unfinished > $(KEY); \
	$(PYTHON) -m venv $(VENV); \
	$(PIP) install -qq --progress-bar off -r requirements.lock; \
	echo "$$key" > $(KEY)
	@set -e; \
	key="$$(cksum < pyproject.toml)"; \
	if [ "$$key" = "$$(cat $(METADATA_KEY) 2>/dev/null)" ]; then exit 0; fi; \
	$(PIP) install -qq --no-deps --no-build-isolation --editable .; \
	$(PIP) check; \
	echo "$$key" > $(METADATA_KEY)

setup-torch: setup ## Add what the live comparisons with PyTorch need
	@set -e; \
	key="$$(cat $(KEY) requirements-torch.lock | cksum)"; \
	if [ "$$key" = "$$(cat $(TORCH_KEY) 2>/dev/null)" ]; then exit 0; fi; \
	echo "Adding PyTorch to $(VENV)"; \
	if $(PIP) install -qq --progress-bar off -r requirements-torch.lock; then \
	  echo "$$key" > $(TORCH_KEY); \
	elif [ "$$CI" = true ]; then \
	  echo "error: CI must run the comparisons with PyTorch, and it could not be installed" >&2; exit 1; \
	else \
	  echo "warning: PyTorch could not be installed, so the comparisons with it will be skipped" >&2; \
	fi

setup-tpu-compiler: setup ## Add the TPU's compiler, where there is one for this machine
	@set -e; \
	key="$$(cat $(KEY) requirements-tpu-compiler.lock | cksum)"; \
	if [ "$$key" = "$$(cat $(TPU_COMPILER)/.sam-jax-pins 2>/dev/null)" ]; then exit 0; fi; \
	rm -rf $(TPU_COMPILER); \
	echo "Adding the TPU's compiler to $(VENV)"; \
	if $(PIP) install -qq --progress-bar off --no-deps --target $(TPU_COMPILER) \
	    -r requirements-tpu-compiler.lock; then \
	  echo "$$key" > $(TPU_COMPILER)/.sam-jax-pins; \
	elif [ "$$CI" = true ]; then \
	  echo "error: CI must compile the kernels for a TPU, and its compiler could not be installed" >&2; exit 1; \
	else \
	  echo "warning: no TPU compiler for this machine, so kernels will not be compiled by the tests" >&2; \
	fi

uv: check-python
	@$(PYTHON) -m venv .venv-lock
	@.venv-lock/bin/python -m pip --disable-pip-version-check install -qq uv==$(UV_VERSION)

lock: uv ## Resolve the pins again; UPGRADE=1 moves them to the newest releases
	$(UV_COMPILE) --extra dev --output-file requirements.lock
	cat requirements.lock requirements-torch.lock > .venv-lock/all.lock
	$(UV_COMPILE) --extra dev --extra parity --output-file .venv-lock/all.lock
	{ echo "# Added to requirements.lock for the comparisons with PyTorch; written by 'make lock'."; \
	  grep -vxFf requirements.lock .venv-lock/all.lock; } > requirements-torch.lock

test-lowest: uv ## Run the tests, less those against PyTorch, on the oldest supported dependencies
	rm -rf .venv-lowest
	$(PYTHON) -m venv .venv-lowest
	.venv-lock/bin/uv pip compile --quiet --resolution lowest-direct --no-annotate --no-emit-index-url \
	  --python .venv-lowest/bin/python --extra dev --output-file .venv-lowest/pins pyproject.toml
	.venv-lowest/bin/python -m pip --disable-pip-version-check install -qq -r .venv-lowest/pins
	.venv-lowest/bin/python -m pip --disable-pip-version-check install -qq --no-deps --no-build-isolation -e .
	.venv-lowest/bin/python -m pytest -n $(JOBS) -m "not parity" -W ignore::DeprecationWarning $(PYTEST_ARGS)

clean: ## Remove the environments made here and the caches; runs/ stays
	@if [ -e $(KEY) ]; then rm -rf $(VENV); fi
	rm -rf .venv-lock .venv-lowest build dist .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find sam_jax configs tests -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
