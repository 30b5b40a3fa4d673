# Everything runs in a virtual environment of its own, made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= runs/demo

.PHONY: install install-dev demo docs prose test lint types imports unit thorough format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     compare dense with block-sparse attention on short ListOps (CPU, minutes)"
	@echo "make test     linters, types, import rules and all tests"
	@echo "make thorough the tests that repeat others for other dtypes, sizes or an older PyTorch"
	@echo "make docs     the documentation as a site, in site/"
	@echo "make install  the package and its command line, in $(VENV)"
	@echo "make format   let ruff format and fix what it can"
	@echo "make clean    remove the environment and everything made"

# pip cannot upgrade itself where the system forbids it; a fresh venv's pip is recent enough.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[experiments]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

demo: install
	$(BIN)/sparse-flash compare listops-short --out $(DEMO)

# The checks use one core each.
test: install-dev
	$(MAKE) -j 2 --output-sync=target lint prose types imports
	$(MAKE) unit

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Spelling of everything, style of the pages, and the form of files for GitHub.
CHECK_FORM := $(BIN)/check-jsonschema --builtin-schema
prose: install-dev
	$(CHECK_FORM) vendor.github-workflows .github/workflows/*.yml
	$(CHECK_FORM) vendor.github-issue-forms $(filter-out %config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(CHECK_FORM) vendor.citation-file-format CITATION.cff
	$(BIN)/codespell
	$(BIN)/proselint --config .proselintrc.json check README.md CONTRIBUTING.md docs/*.md
	$(BIN)/python -m tools.prose

$(VENV)/.installed-docs: $(VENV)/.installed-dev
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	@touch $@

# Pages, tables and pictures must be those of the recorded results; links must lead somewhere.
docs: $(VENV)/.installed-docs sources
	$(BIN)/python -m tools.report --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict -q
	$(BIN)/python -m pytest tests/test_docs.py -k site
	@echo "open site/index.html"

# mypy does not follow setuptools' package-dir mapping: show it the folders as one package.
types: install-dev sources
	$(BIN)/mypy

.PHONY: sources
sources:
	@rm -rf .typecheck/sparse_flash
	@mkdir -p .typecheck/sparse_flash
	@for part in masks kernels experiments; do ln -sfn ../../$$part .typecheck/sparse_flash/$$part; done
	@for file in sparse_flash/*; do ln -sfn ../../$$file .typecheck/sparse_flash/$$(basename $$file); done

# Nor does import-linter, which wants real folders.
imports: install-dev
	@rm -rf .typecheck/copy && mkdir -p .typecheck/copy && cp -r sparse_flash .typecheck/copy/
	@cp -r masks kernels experiments .typecheck/copy/sparse_flash/
	cd .typecheck/copy && $(abspath $(BIN))/lint-imports --config ../../pyproject.toml

# Two workers, a thread each, a half of the files each; who is ready first takes from the other.
# What is timed or large runs alone, afterwards.
PYTEST := $(BIN)/python -m pytest
HERE := not gpu and not matrix and not thorough
unit: install-dev
	$(PYTEST) -n 2 --dist worksteal -m "$(HERE) and not slow"
	$(PYTEST) -m "$(HERE) and slow"

# What repeats the above for other dtypes, other sizes or an older PyTorch.
thorough: install-dev
	$(PYTEST) -n 2 --dist worksteal -m "thorough and not gpu"

format: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .typecheck site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache runs
