# A fresh machine needs Python 3.11 to 3.13 and nothing else: every target makes .venv and installs into it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test test-slow test-faults lint install clean

run: .venv/.run
	$(BIN)/fed-diffusion run digits --engine flower

test: .venv/.test
	$(BIN)/python -m pytest

test-slow: .venv/.test
	$(BIN)/python -m pytest -m slow

test-faults: .venv/.test
	$(BIN)/python -m pytest -m slow tests/test_deployment.py

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: .venv/.test

.venv/.run: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/.test: pyproject.toml .venv/.run
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf .venv build dist
