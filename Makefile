# Everything there is to do in a checkout, as root on Debian: `make demo` and `make test`.
# Both do the set-up they need by themselves, once; see tools/setup.

PYTHON := .venv/bin/python
# Two workers on any machine; one of them boots the guests (tests/support/schedule.py).
PYTEST_ARGUMENTS ?= -n 2

.DEFAULT_GOAL := help
.PHONY: help demo test lint types tests bench setup clean

help:
	@echo "make demo    build a small bundle, run it, show what came of it"
	@echo "make test    lint, types and all tests"
	@echo "make bench   the benchmarks"
	@echo "make clean   remove what the others made"

demo:
	@tools/setup demo
	@$(PYTHON) tools/demo.py

test: lint types tests

lint: setup
	.venv/bin/ruff check .

types: setup
	.venv/bin/mypy

tests: setup
	$(PYTHON) -m pytest $(PYTEST_ARGUMENTS)

bench: setup
	$(PYTHON) -m benchmarks

setup:
	@tools/setup test

clean:
	rm -rf .venv .cache .hypothesis .pytest_cache .mypy_cache .ruff_cache dist build
	find sandboxfs tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
