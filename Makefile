# Two commands on a fresh machine: `make demo` and `make test`. Both need Python 3.11 or later, and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: help demo test lint types unit bench clean

help:
	@echo "make demo    install, then the whole main job on real documents, in under two minutes"
	@echo "make test    install, then everything CI runs"
	@echo "make bench   benchmarks beside sentence-transformers; results in benchmarks/results"
	@echo "make clean   remove .venv and caches"

demo: $(VENV)/.demo
	@$(BIN)/chunkmill demo

test: lint types
	@echo "== pytest, on real Postgres, Redis and Celery workers"
	@$(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(VENV)/.dev
	@echo "== ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "== import-linter"
	@$(BIN)/lint-imports

types: $(VENV)/.dev
	@echo "== mypy --strict"
	@$(BIN)/mypy

bench: $(VENV)/.dev
	@$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Chunkmill needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) -V). Try: make PYTHON=python3.12 demo"; exit 1; }
	@echo "== making $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv"; exit 1; }

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "== installing from constraints.txt (about 350 MB; a minute or two)"
	@$(PIP) -e '.[worker,embedded,flower,parquet]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "== installing from constraints.txt (about 400 MB; a minute or two)"
	@$(PIP) -e '.[dev]'
	@touch $(VENV)/.demo $@
