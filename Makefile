# From a bare clone: `make run`, `make test`. Needs Python 3.11 or newer, git and the package index, nothing else.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help run demo test soak lint docs clean

BIN := .venv/bin
# The environment of what we start; the shell looks programs up in it.
ACTIVATE := PATH="$(CURDIR)/$(BIN):$$PATH"
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-compile
# pip would do it on one core: a minute. Like it, pass over files of packages that are for no Python of today.
COMPILE := $(BIN)/python -m compileall -qq -j 0 .venv/lib || :
TWO := -n 2 --dist loadfile
IS_FIT := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: .venv/.installed ## install, make the demo data if there is none, run the whole pipeline, say where to look
	@$(ACTIVATE); test -e data/dataset.json || nss data demo
	@$(ACTIVATE); nss run

demo: .venv/.installed ## install, then three cycles in a workspace of their own, demo/: smaller, more classes, another light
	@$(ACTIVATE); nss demo

# In the order of the files: those that run whole cycles go first, and small ones fill what is left of both workers.
test: lint ## install, lint, run all tests but the soak tests; nss must be covered to 90 %
	OMP_NUM_THREADS=1 $(BIN)/pytest $(TWO) --no-loadscope-reorder -m "not soak" --cov=nss --cov-report=term --cov-fail-under=90 --durations=20

soak: .venv/.installed-dev ## run the repeated kills, long races and whole stories
	OMP_NUM_THREADS=1 $(BIN)/pytest $(TWO) -m soak

lint: .venv/.installed-dev ## check style, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/.installed-dev ## write docs/ and the reference of the library as pages to site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean: ## remove the environment and what tools left behind; data, results and runs stay
	rm -rf .venv site .coverage .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find nss tasks flows bench tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: installed again only when pyproject.toml has changed.
.venv/.installed: pyproject.toml | $(BIN)/pip
	@echo "Installing nss into .venv. The first time, this takes minutes and several GB (PyTorch)."
	@$(PIP) --editable .
	@$(COMPILE)
	@touch $@

.venv/.installed-dev: pyproject.toml | $(BIN)/pip
	@echo "Installing nss and its development tools into .venv. The first time, this takes minutes and several GB."
	@$(PIP) --editable '.[dev]'
	@$(COMPILE)
	@touch .venv/.installed $@

# pip comes last into an environment: one that was interrupted before is completed.
$(BIN)/pip:
	@for python in $${PYTHON:-python3.11 python3.12 python3.13 python3.14 python3 python}; do \
		if "$$python" -c '$(IS_FIT)' 2>/dev/null; then \
			echo "Making .venv with $$("$$python" --version)."; \
			exec "$$python" -m venv .venv; \
		fi; \
	done; \
	echo "error: no Python 3.11 or newer that can make environments (looked for: $${PYTHON:-python3.11 to python3.14, python3, python})." >&2; \
	echo "  fix: install one with its venv module (Debian: apt install python3-venv), or name one: make PYTHON=/path/to/python3.11 run" >&2; \
	exit 1
