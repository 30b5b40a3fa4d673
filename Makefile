# Everything runs in a virtual environment of its own, made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= runs/demo

.PHONY: install install-dev demo test lint types imports unit format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     compare dense with block-sparse attention on short ListOps (CPU, minutes)"
	@echo "make test     linters, types, import rules and all tests"
	@echo "make install  the package alone, in $(VENV)"
	@echo "make format   let ruff format and fix what it can"
	@echo "make clean    remove the environment and everything made"

# pip cannot upgrade itself where the system forbids it; a fresh venv's pip is recent enough.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

demo: install
	$(BIN)/sparse-flash compare listops-short --out $(DEMO)

test: lint types imports unit

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not follow setuptools' package-dir mapping: show it the folders as one package.
types: install-dev
	@mkdir -p .typecheck/sparse_flash
	@for part in masks kernels experiments; do ln -sfn ../../$$part .typecheck/sparse_flash/$$part; done
	@for file in sparse_flash/*; do ln -sfn ../../$$file .typecheck/sparse_flash/$$(basename $$file); done
	$(BIN)/mypy

# Nor does import-linter, which wants real folders.
imports: install-dev
	@rm -rf .typecheck/copy && mkdir -p .typecheck/copy && cp -r sparse_flash .typecheck/copy/
	@cp -r masks kernels experiments .typecheck/copy/sparse_flash/
	cd .typecheck/copy && $(abspath $(BIN))/lint-imports --config ../../pyproject.toml

# Two workers, a thread each, a half of the files each; who is ready first takes from the other.
# What is timed or large runs alone, afterwards.
unit: install-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu"
	$(BIN)/python -m pytest -m "slow and not gpu"

format: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .typecheck build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache runs
