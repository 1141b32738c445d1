# Every target makes .venv if need be. PYTHON=… chooses the interpreter that .venv is made with.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?=
GPU_PYTHON ?= $(BIN)/python
BENCHMARKS := accuracy overhead record latency api
# Two at a time: most of what a test waits for are other processes.
TEST_WORKERS ?= 2

.PHONY: help install demo test lint bench bench-compare faults faults-points faults-selftest soak gpu clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Make .venv with all that the demo, the tests and both packages need

demo: $(STAMP) ## Train on handwritten digits through the HTTP API, watch it, print the statistics
	@$(BIN)/python examples/demo.py

test: lint ## Everything a machine without a GPU can test: lint, types, import contracts, tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n $(TEST_WORKERS) --dist worksteal --durations=15 $(PYTEST_ARGS)

# TYPED is the part of tests/ whose types hold; the engine's and the worker's own tests are still to come.
TYPED := $(filter-out tests/__pycache__ tests/amp tests/training tests/worker tests/gpu,$(patsubst %/,%,$(wildcard tests/*/))) benchmarks examples

lint: $(STAMP) ## Formatting, lint, strict types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=src:. $(BIN)/mypy --explicit-package-bases --follow-imports=silent $(TYPED)
	$(BIN)/lint-imports

bench: $(STAMP) ## Run the benchmarks into benchmarks/results; BENCHMARKS=… chooses, BENCH_ARGS=… goes to each
	@for each in $(BENCHMARKS); do \
	    echo "benchmarks.$$each"; $(BIN)/python -m benchmarks.$$each $(BENCH_ARGS) || exit 1; \
	done

bench-compare: $(STAMP) ## What got slower: OLD=… NEW=…, two result files or directories
	$(BIN)/python -m benchmarks.compare $(OLD) $(or $(NEW),benchmarks/results)

faults: $(STAMP) ## The fault suite's release form; FAULTS_ARGS=… (--jobs, --faults, --seed, --database)
	$(BIN)/python -m tests.faults.run --jobs 1000 --faults 300 $(FAULTS_ARGS)

faults-points: $(STAMP) ## Kill a process at each named crash point, once and twice in a row; FAULTS_ARGS=… (--database)
	$(BIN)/python -m tests.faults.points $(FAULTS_ARGS)

soak: $(STAMP) ## The fault suite for hours
	$(BIN)/python -m tests.faults.run --jobs 5000 --faults 1500 $(FAULTS_ARGS)

faults-selftest: $(STAMP) ## Break the product on purpose: each break must turn the fault suite red
	$(BIN)/python -m tests.faults.mutants $(FAULTS_ARGS)

gpu: ## The tests that need a CUDA device; GPU_PYTHON=… uses another environment than .venv
	@test -x "$$(command -v $(GPU_PYTHON))" || $(MAKE) install
	$(GPU_PYTHON) -m pytest -m gpu $(wildcard tests/gpu) tests/amp $(PYTEST_ARGS)

clean: ## Remove .venv and what tools left behind
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# One pip call, so that the pins hold for everything: torch's pin names no build, and a CUDA host takes its own.
$(STAMP): pyproject.toml constraints.txt
	@python=''; \
	for each in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do \
	    if "$$each" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; \
	    then python=$$each; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo 'make: no Python 3.11, 3.12 or 3.13 with venv and ensurepip was found (tried: $(or $(PYTHON),python3.11 python3.12 python3.13 python3)).' >&2; \
	    echo 'Install one (Debian, Ubuntu: python3-venv too), or name it: make install PYTHON=/path/to/python3.11' >&2; \
	    exit 1; \
	fi; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    echo "making $(VENV) with $$("$$python" --version)"; \
	    "$$python" -m venv --clear $(VENV); \
	fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all,dev]"
	@touch $@
