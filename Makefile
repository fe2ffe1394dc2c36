# `make certify` and `make test` are complete on a fresh machine with Python 3.11 or newer. `make help` lists the rest.

PYTHON ?= python3
VENV := .venv
ARGS :=
JOBS ?= 2

# Idle OpenMP threads that spin make a busy machine several times slower.
export OMP_WAIT_POLICY ?= PASSIVE

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install auto-lirpa certify test proofs check fmt build wheel-check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile
	@echo 'PYTHON=python3.12 chooses the Python that makes $(VENV); ARGS="..." is passed to verideq certify and to pytest; JOBS=8 tests in as many processes.'

install: $(STAMP) ## make the virtual environment and install verideq into it

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'verideq needs Python 3.11 or newer, and "$(PYTHON)" is not; name one: make PYTHON=python3.12 ...' >&2; exit 1; }
	@echo 'installing verideq and what it needs into $(VENV): once, a few minutes'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[dev]'
	@touch $@

auto-lirpa: $(STAMP) ## install auto_LiRPA 0.3, whose tests are skipped without it
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[lirpa]'
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps auto_LiRPA==0.3

certify: $(STAMP) ## certify the bundled model on the digits; e.g. ARGS="--eps 0.1 --limit 50"
	$(BIN)/verideq certify $(ARGS)

test: $(STAMP) ## run the tests; e.g. ARGS="tests/test_region.py -x"
	$(BIN)/pytest -n $(JOBS) --dist loadfile $(ARGS)

proofs: $(STAMP) ## search for counterexamples to every theorem: two minutes; docs/theorems.md lists them
	$(BIN)/pytest -n $(JOBS) --dist loadfile proofs_checks $(ARGS)

check: $(STAMP) ## lint, check the layout of the code, check the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict verideq benchmarks examples

fmt: $(STAMP) ## mend what `make check` can mend by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: $(STAMP) ## build the sdist, and the wheel from it, into dist/
	$(BIN)/python -m build

wheel-check: $(STAMP) ## build both, look inside, and run the installed wheel from an empty folder
	bash tests/wheel.sh $(BIN)/python

clean: ## remove the virtual environment and everything built
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
