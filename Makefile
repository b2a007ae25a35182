# The doors. Each sets up what it needs in .venv; a second run is fast, and a changed
# pyproject.toml installs anew.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEED ?= 0
MINUTES ?= 10
PYTEST := $(BIN)/python -m pytest
# A test that fails is run once more, and listed: on a machine that it shares with others, a defect of
# the test is told from one of the program. What is listed is to be mended.
RERUN := --reruns 1 -rfER

.PHONY: help serve test test-slow check bench sim fuzz setup clean

help:
	@echo "make serve       serve the default model; MLX_SERVING_* variables are its settings"
	@echo "make test        unit, contract and short simulation tests, with coverage"
	@echo "make test-slow   the tests that take minutes"
	@echo "make check       format, lint, types, import contracts, tidiness"
	@echo "make bench       build llama.cpp once, measure beside it and mlx_lm.server, and write"
	@echo "                 benchmarks/RESULTS.md; ROUNDS=1 for a quick look"
	@echo "make sim SEED=1  one seed of the deterministic simulation"
	@echo "make fuzz MINUTES=10  the fuzzers, for longer than the tests do"
	@echo "make clean       remove .venv and what was built"
	@echo
	@echo "PYTHON=python3.12 picks the interpreter; MLX_EXTRA=cpu|cuda12|cuda13 the MLX backend."

serve: $(VENV)/.runtime
	@exec $(BIN)/mlx-serving serve

test: $(VENV)/.dev
	$(PYTEST) -m "not slow" -n logical --maxprocesses 8 --dist worksteal --timeout 300 $(RERUN) --cov --cov-report=term:skip-covered --cov-fail-under=85

test-slow: $(VENV)/.dev
	$(PYTEST) -m slow -n 1 $(RERUN)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(PYTEST) tests/test_tidy.py

bench: $(VENV)/.dev
	$(BIN)/python -m mlx_serving.bench.llama_cpp
	$(BIN)/python -m mlx_serving.bench $(ROUNDS:%=--rounds %) --write benchmarks/RESULTS.md
	$(BIN)/python benchmarks/llamacpp.py $(ROUNDS:%=--rounds %) --append benchmarks/RESULTS.md

sim: $(VENV)/.dev
	PYTHONPATH=tests $(BIN)/python -m sim $(SEED)

fuzz: $(VENV)/.dev
	PYTHONPATH=tests $(BIN)/python -m security.fuzz $(MINUTES)

setup: $(VENV)/.dev

# What tests need includes what serving needs, so that neither stamp undoes the other.
$(VENV)/.runtime: pyproject.toml scripts/setup_env.py
	@$(PYTHON) scripts/setup_env.py $(VENV)
	@touch $@

$(VENV)/.dev: pyproject.toml scripts/setup_env.py
	@$(PYTHON) scripts/setup_env.py $(VENV) --dev
	@touch $@ $(VENV)/.runtime

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
