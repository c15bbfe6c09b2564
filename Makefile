PYTHON ?= python3
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUNS := $(VENV)/.runs

# One thread per test process: two that each start a thread per core only wait for one another.
PYTEST = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# pyright's wrapper would ask the network for a newer release.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo check test test-fast format common-tests miniature clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv and install the package with its development tools

# pyproject.toml is what the environment depends on; the code itself is installed in place.
define INSTALL
@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
@echo "Installing into $(VENV); the first time takes some minutes."
@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable
endef

$(STAMP): pyproject.toml
	$(INSTALL) '.[dev]'
	@touch $@ $(RUNS)

# What running models takes, and no more.
$(RUNS): pyproject.toml
	$(INSTALL) '.[video]'
	@touch $@

demo: $(RUNS) ## Segment a picture and follow a phrase through a clip
	@HF_HUB_OFFLINE=1 $(BIN)/python examples/demo.py

check: $(STAMP) ## Format, lint, types and import layers
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo

test: common-tests ## Every test that needs no Hub
	$(PYTEST) -m "not hub"

test-fast: common-tests ## The tests without the slow ones
	$(PYTEST) -m "not hub and not slow"

format: $(STAMP) ## Rewrite the code in the house format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

common-tests: $(STAMP) ## Fetch the common tests of the installed transformers
	@$(BIN)/python tests/fetch_common_tests.py

FOLDER ?= outputs/miniature
MINUTES ?= 150
ONLY ?= all

miniature: $(STAMP) ## Train the miniature, from where it stopped (FOLDER=..., MINUTES=..., ONLY=..., TRAINED=...)
	$(BIN)/python -m examples.miniature --folder $(FOLDER) --minutes $(MINUTES) --only $(ONLY) \
		$(if $(TRAINED),--trained $(TRAINED))

clean: ## Remove the environment, caches and build outputs
	rm -rf $(VENV) tests/.transformers-common build dist
	rm -rf .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
