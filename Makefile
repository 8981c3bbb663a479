# Each target works alone on a fresh machine with Python 3.11 or newer.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell command -v $(name) 2>/dev/null)))
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test fast slow check format docs clean

demo: .venv/run
	$(BIN)/maskdm-server demo --out maskdm-demo

test: fast slow

fast: .venv/test
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2

slow: .venv/test
	$(BIN)/python -m pytest -m slow --numprocesses 2

check: .venv/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: .venv/run
	$(BIN)/python docs/make_reference.py
	$(BIN)/python docs/make_api.py
	$(BIN)/python docs/figures.py

clean:
	rm -rf .venv maskdm-demo dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/run: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP_INSTALL) --editable .
	touch $@

.venv/test: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP_INSTALL) --editable '.[test]'
	touch $@ .venv/run
