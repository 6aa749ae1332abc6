# The two commands of the README. Both install into .venv first; a GPU machine gets the CUDA build of torch, others
# whatever build pip finds for them.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test setup check

demo: setup
	$(BIN)/python train.py
	$(BIN)/python train.py stage=dpo
	$(BIN)/python -m zephyr.demo

test: setup .venv/tests
	$(BIN)/python -m pytest

setup: .venv/installed

check: setup .venv/tests
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

.venv/tests: .venv/installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	touch $@
