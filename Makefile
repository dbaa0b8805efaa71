# Two commands on a fresh machine: `make quickstart` and `make test`. Both install by themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
NOT_HERE := not peers and not tpu_aot and not gpu_aot and not gpu

.PHONY: install quickstart test test-fast check check-long lint types peers smoke clean

install: $(VENV)/installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "modicum needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1); run make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python setup.cfg pyproject.toml constraints.txt
	@echo "installing modicum into $(VENV)"
	@$(PIP) install --constraint constraints.txt --editable '.[test]' 2>&1 | grep -v '^WARNING: Location' || true
	@$(BIN)/python -c 'import modicum.models, pytest' && touch $@

# Extras of CI. Torch first and by exact version: a range would fetch gigabytes of CUDA packages.
$(VENV)/installed-check: $(VENV)/installed
	@echo "installing peers and linters into $(VENV)"
	@$(PIP) install torch==2.13.0 2>&1 | grep -v '^WARNING: Location' || true
	@$(PIP) install --constraint constraints.txt --editable '.[test,peers,lint]' 2>&1 | grep -v '^WARNING: Location' || true
	@$(BIN)/python -c 'import torch, transformers, peft, mypy' && touch $@

quickstart: install
	@$(BIN)/modicum quickstart

test: install
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m "$(NOT_HERE)"

test-fast: install
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and $(NOT_HERE)"

check: peers lint types smoke

peers: $(VENV)/installed-check
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m "peers"

# Tests that only repeat (kills at random moments, flipped bits), repeated more often.
check-long: install
	@MODICUM_LONG=1 $(BIN)/python -m pytest -n 2 --dist worksteal -k "killed or flipped"

lint: $(VENV)/installed-check
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

# mypy does not see through an editable install, so it is shown the checkout under the package's name.
types: $(VENV)/installed-check
	@mkdir -p .typecheck && ln -sfn .. .typecheck/modicum
	@MYPYPATH=.typecheck $(BIN)/mypy -p modicum

smoke: install
	@$(BIN)/modicum quickstart --smoke --out .cache/quickstart

clean:
	@rm -rf $(VENV) .cache .typecheck .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
