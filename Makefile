# make sweep: a real sweep from nothing.  make test: the tests from nothing (CI=true: the slow ones too).  The second call of each is fast.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: sweep test lint audit docs clean

sweep: $(VENV)/.kdexp
	$(BIN)/kdexp sweep sweeps/digits.yaml

test: $(VENV)/.test
	$(BIN)/python -m pytest

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: $(VENV)/.lint
	$(BIN)/pip-audit -r constraints.txt --no-deps --disable-pip --progress-spinner off

# A page, a link or a heading that does not hold fails.
docs: $(VENV)/.docs
	$(BIN)/sphinx-build --quiet --fail-on-warning --fresh-env --conf-dir docs . build/docs
	@cp build/docs/README.html build/docs/index.html && echo build/docs/index.html

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "kdexp needs Python 3.11 or newer: make PYTHON=python3.x"'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.kdexp: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing kdexp into $(VENV) (PyTorch is large: some minutes the first time) …"
	$(PIP) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.kdexp
	$(PIP) -e '.[test]'
	@touch $@

$(VENV)/.lint: $(VENV)/.kdexp
	$(PIP) -e '.[lint]'
	@touch $@

$(VENV)/.docs: $(VENV)/.kdexp
	$(PIP) -e '.[docs]'
	@touch $@
