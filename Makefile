# Two commands need only this checkout, Python 3.11 with venv, and make: `make quickstart` and `make test`.
#
# Variables:  PYTHON=python3.12      another interpreter (3.11 or newer)
#             TORCH=torch==2.13.0    the PyTorch to install; empty takes what setup.py's range finds
#             TORCH_INDEX_URL=URL    where to take it from, e.g. https://download.pytorch.org/whl/cpu on a machine without a GPU
#             OUT=DIR MINUTES=M      of the quickstart        PROCESSES=N  of the tests
# pip's own configuration (pip.conf, PIP_* variables) is honoured throughout.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch==2.13.0
PROCESSES ?= 2
OUT ?= quickstart
SEED ?= 0

# What is installed is named by setup.py and the choice of PyTorch: unchanged, nothing is installed again.
INSTALLED := $(shell { cat setup.py; echo '$(TORCH) $(TORCH_INDEX_URL)'; } | cksum | cut -d ' ' -f 1)
RUN := $(VENV)/.installed-$(INSTALLED)
DEV := $(VENV)/.installed-dev-$(INSTALLED)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Threads of tests are fixed: sums on CPU depend on their number.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile

.PHONY: help quickstart ten-small test test-slow test-gpu lint bench bench-data clean

help:
	@echo "make quickstart   the whole path on this machine's own text: corpus, manifest, twin, run, evaluation, report"
	@echo "make ten-small    the same with the experiments of the paper (examples/ten-small.yaml); SEED=S, OUT=DIR"
	@echo "make test         all tests that run everywhere in minutes"
	@echo "make test-slow    the long ones (several processes, kill and resume, the quickstart itself)"
	@echo "make test-gpu     those that need a CUDA device"
	@echo "make lint         ruff and mypy"
	@echo "make bench        measurements, side by side with the peer (bench-data: those about data)"
	@echo "make clean        remove the environment, caches and OUT=$(OUT)"

quickstart: $(if $(wildcard $(DEV)),$(DEV),$(RUN))
	@echo "Installation took $$(cat $<) s."
	$(BIN)/megatron-exp quickstart --out $(OUT) $(if $(MINUTES),--minutes $(MINUTES))

ten-small: $(if $(wildcard $(DEV)),$(DEV),$(RUN))
	$(BIN)/megatron-exp quickstart --config examples/ten-small.yaml --out $(if $(filter quickstart,$(OUT)),ten-small-$(SEED),$(OUT)) --seed $(SEED)

test: $(DEV)
	$(PYTEST) -m 'not slow and not gpu'

test-slow: $(DEV)
	$(PYTEST) -m 'slow and not gpu'

test-gpu: $(DEV)
	$(BIN)/python -m pytest -m gpu

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/mypy

DATA_BENCHMARKS := preprocess preprocess_memory verify_corpus plan_paper_scale payload_store inspect_step stream_start slot_reads search

bench: $(DEV)
	@for script in $(filter-out benchmarks/measuring.py benchmarks/rivals.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python "$$script"; done

bench-data: $(DEV)
	@for name in $(DATA_BENCHMARKS); do echo "== benchmarks/$$name.py"; $(BIN)/python benchmarks/$$name.py; done

clean:
	rm -rf $(VENV) $(OUT) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find megatron_exp tests -name __pycache__ -type d -prune -exec rm -rf {} +

# PyTorch comes first and pinned: an open range would fetch the newest build with several gigabytes of CUDA libraries.
$(DEV): WANTED := .[dev,hf]
$(RUN): WANTED := .
$(RUN) $(DEV): | $(BIN)/pip
	@start=$$SECONDS; \
	$(if $(TORCH),$(PIP) install $(if $(TORCH_INDEX_URL),--index-url '$(TORCH_INDEX_URL)') '$(TORCH)';) \
	$(PIP) install -e '$(WANTED)'; \
	rm -f $(VENV)/.installed-*; \
	echo $$((SECONDS - start)) > $@

$(BIN)/pip:
	@if [ -z "$(PYTHON)" ] || ! "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	  echo "megatron-exp needs Python 3.11 or newer; found $(or $(PYTHON),none)." \
	       "Install it (Debian 12: apt install python3 python3-venv), or name it: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; fi
	@if ! "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null; then \
	  echo "$(PYTHON) has no venv module with pip. Install it (Debian: apt install python3-venv), or name another: make PYTHON=... " >&2; exit 1; fi
	"$(PYTHON)" -m venv $(VENV)
