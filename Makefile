# The commands of the project. `make demo` and `make test` need nothing set up before them:
# Python 3.11 or newer with pip, git, node and npm are enough.

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# Whoever has the developers' tools has all that the demo needs.
DEMO_READY := $(firstword $(wildcard $(VENV)/.dev) $(VENV)/.demo)

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

# pip in one line: the names of what it fetches, as it goes, and its errors.
PIP_INSTALL = $(BIN)/python -m pip install
ONE_LINE = awk '/^ *Collecting/ { sub(/[^A-Za-z0-9._-].*/, "", $$2); printf "%s ", $$2; fflush() } END { print "" }'

.DEFAULT_GOAL := help
.PHONY: help demo test check clean programs

help:
	@echo "make demo    see it work: the application, its browser page and what to try"
	@echo "make test    set up what is missing, then lint, types and all tests"
	@echo "make check   lint and types alone"
	@echo "make clean   remove $(VENV) and every cache"

demo: $(DEMO_READY)
	@exec $(BIN)/pubsub-mw demo $(ARGS)

test: programs check
	@$(BIN)/pytest -n 2 --dist loadfile $(ARGS)

check: $(VENV)/.dev
	@$(BIN)/ruff format --check
	@$(BIN)/ruff check
	@$(BIN)/mypy

clean:
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist tests/static/node_modules
	@find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@echo "Installing pubsub-mw and Flask into $(VENV), once ..."
	@$(PIP_INSTALL) --editable . flask | $(ONE_LINE)
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "Installing pubsub-mw and its development tools into $(VENV), once ..."
	@$(PIP_INSTALL) --quiet --upgrade 'pip>=25.1'
	@$(PIP_INSTALL) --editable . --group dev | $(ONE_LINE)
	@touch $@

# Debian keeps `ensurepip` in a package of its own; there the pip of the system fills the environment.
$(BIN)/python:
	@command -v '$(PYTHON)' > /dev/null \
	  || { echo "$(PYTHON) was not found. Name a Python 3.11 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is $$('$(PYTHON)' --version), and 3.11 or newer is needed." \
	       "Name one: make PYTHON=python3.12" >&2; exit 1; }
	@rm -rf $(VENV)
	@'$(PYTHON)' -m venv $(VENV) > /dev/null \
	  || { '$(PYTHON)' -m venv --clear --without-pip $(VENV) \
	       && '$(PYTHON)' -m pip --python $(BIN)/python install --quiet pip; } \
	  || { rm -rf $(VENV); echo "$(PYTHON) can make no virtual environment. On Debian: apt install python3-venv" >&2; exit 1; }

# The tests use a real Redis, a real browser, nginx, curl, node and a C compiler. They are named here, and installed where that can be done
# unasked.
programs:
	@missing=(); \
	command -v redis-server > /dev/null || missing+=(redis-server); \
	command -v chromium chromium-browser google-chrome > /dev/null || missing+=(chromium); \
	command -v node > /dev/null || missing+=(nodejs); \
	command -v npm > /dev/null || missing+=(npm); \
	command -v cc > /dev/null || missing+=(gcc libc6-dev); \
	PATH="$$PATH:/usr/sbin" command -v nginx > /dev/null || missing+=(nginx); \
	command -v curl > /dev/null || missing+=(curl); \
	if [ $${#missing[@]} -eq 0 ]; then exit; fi; \
	if [ "$$(id -u)" = 0 ]; then sudo=(env); else sudo=(sudo -n); fi; \
	if command -v apt-get > /dev/null && "$${sudo[@]}" true 2> /dev/null; then \
	  echo "Installing $${missing[*]} ..."; \
	  "$${sudo[@]}" apt-get update -qq; \
	  "$${sudo[@]}" env DEBIAN_FRONTEND=noninteractive \
	    apt-get install -qq --no-install-recommends "$${missing[@]}" > /dev/null; \
	else \
	  echo "The tests need $${missing[*]}, and this account may not install packages. Please run:" >&2; \
	  echo "    sudo apt-get install $${missing[*]}" >&2; \
	  echo "or, where there is no apt, install them in your system's way. Then: make test" >&2; \
	  exit 1; \
	fi
