# Each goal does its own set-up: `make demo` and `make test` work in a fresh clone.
#
#   PYTHON  the Python that makes the environment          make test PYTHON=python3.12
#   VENV    the environment; one that exists is used       make demo VENV=$VIRTUAL_ENV
#   TORCH   what pip installs where torch is missing       make demo TORCH=torch==2.12.0
#   DEMO    options of the demo                            make demo DEMO=--help
#   PYTEST  more options for the tests                     make test PYTEST="-k laws -x"
#
# A torch that can be imported in VENV is left alone, whatever its version: the pins then hold for
# everything else. For a CPU-only or a CUDA build, set TORCH or pip's own configuration.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PYTEST ?=
DEMO ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Two test processes on two cores: more threads in each would wait for each other.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PINS := $(VENV)/constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-integrations test-ui docs lint bench tables clean

help: ## list the goals
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "Settings, as in 'make test PYTHON=python3.12': PYTHON VENV TORCH DEMO PYTEST (see Makefile)"

demo: $(VENV)/.demo ## learn five tasks of handwritten digits in a row; writes runs/demo/report.html
	@$(BIN)/lifelong demo $(DEMO)

# worksteal: a process that has finished its share takes over some of the other's. The site first:
# what it needs holds what the tests need, and one installation is quicker than two.
test: docs lint ## linters, type checker, the site and all tests
	@echo "== tests"
	@$(ONE_THREAD) $(BIN)/python -m pytest --quiet --numprocesses=2 --dist=worksteal \
		--ignore=tests/integrations --ignore=tests/app_browser $(PYTEST)

# Their packages are too large for everyone who runs `make test`.
test-integrations: $(VENV)/.integrations ## the tests of lifelong.integrations, with the frameworks
	@echo "== tests of the integrations"
	@$(ONE_THREAD) $(BIN)/python -m pytest --quiet tests/integrations $(PYTEST)

# Drives a browser: Playwright's own, or CHROMIUM=/usr/bin/chromium.
test-ui: $(VENV)/.ui ## the tests of lifelong ui in a browser, and of its interface
	@echo "== tests of the page"
	@$(ONE_THREAD) $(BIN)/python -m pytest --quiet tests/app_browser $(PYTEST)

# The order of imports is checked by tests/test_layers.py.
lint: $(VENV)/.dev ## linters and type checker only
	@echo "== ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "== types"
	@$(BIN)/basedpyright --level error --pythonpath $(BIN)/python

bench: $(VENV)/.dev ## speed, as ratios to plain PyTorch in the same run
	@$(ONE_THREAD) $(BIN)/python -m pytest benchmarks --benchmark-enable $(PYTEST)

docs: $(VENV)/.docs ## the documentation as a site, in build/site; links checked, built offline
	@echo "== the site"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet && echo "build/site/index.html"

tables: $(VENV)/.dev ## all tables at equal memory (hours, resumable); LIFELONG_DATA=DIR
	@$(BIN)/python -m benchmarks.tables

clean: ## remove .venv and what the tools left; runs/ stays
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache .benchmarks build dist
	find . -name __pycache__ -prune -exec rm -rf {} +

# The set-up. Each stamp is younger than what it was made from, so a second run does nothing.
$(VENV)/.demo: $(PINS)
	@echo "== installing lifelong and what the demo needs, less than a minute"
	@$(PIP) --editable '.[demo]' --constraint $(PINS)
	@touch $@

$(VENV)/.dev: $(PINS)
	@echo "== installing lifelong and what the tests need, about a minute"
	@$(PIP) --editable '.[dev]' --constraint $(PINS)
	@touch $@

$(VENV)/.integrations: $(VENV)/.dev
	@echo "== installing the frameworks that are integrated, about 1 GB"
	@$(PIP) --editable '.[dev,hf,avalanche,lightning,mlflow,wandb,webdataset]' --constraint $(PINS)
	@touch $@

$(VENV)/.ui: $(VENV)/.dev
	@echo "== installing what drives a browser, about 150 MB"
	@$(PIP) --editable '.[dev,test-ui]' --constraint $(PINS)
	@touch $@

$(VENV)/.docs: $(PINS)
	@echo "== installing lifelong and what its tests and its site need, about a minute"
	@$(PIP) --editable '.[dev,docs]' --constraint $(PINS)
	@touch $(VENV)/.dev $@

# constraints.txt, with the version of torch that is there in place of the pinned one.
$(PINS): pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "== making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@grep -v '^torch==' constraints.txt > $@.new
	@$(BIN)/python -c 'import torch' 2>/dev/null || { \
		echo "== installing PyTorch ($(TORCH)), a minute or more"; \
		$(PIP) '$(TORCH)' --constraint $@.new; }
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >> $@.new
	@mv $@.new $@
