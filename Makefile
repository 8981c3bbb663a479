# Each target works alone on a fresh machine with Python 3.11, 3.12 or 3.13.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell command -v $(name) 2>/dev/null)))
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test fast slow newest check format docs clean

demo: $(VENV)/run
	$(BIN)/maskdm-server demo --out maskdm-demo

test: fast slow

fast: $(VENV)/test
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 $(TESTS)

slow: $(VENV)/test
	$(BIN)/python -m pytest -m slow --numprocesses 2

# Library and client with the newest Python that is supported, where this machine has it, also as pyenv keeps it.
newest:
	+@for python in python3.13 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.13.*/bin/python; do \
	  if "$$python" -c 'import ensurepip' 2>/dev/null; then \
	    "$$python" --version; exec $(MAKE) fast VENV=.venv-newest PYTHON="$$python" TESTS="tests/common tests/client"; \
	  fi; \
	done; echo "SKIPPED: make newest, since this machine has no Python 3.13"

check: $(VENV)/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/run
	$(BIN)/python docs/make_reference.py
	$(BIN)/python docs/make_api.py
	$(BIN)/python docs/figures.py

clean:
	rm -rf .venv .venv-newest maskdm-demo dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/run: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable .
	touch $@

$(VENV)/test: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable '.[test]'
	touch $@ $(VENV)/run
