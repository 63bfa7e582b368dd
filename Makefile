# Everything there is to do in a checkout, as root on Debian: `make demo` and `make test`.
# Both do the set-up they need by themselves, once; see tools/setup.

PYTHON := .venv/bin/python
# Two workers on any machine; one of them boots the guests (tests/support/schedule.py).
PYTEST_ARGUMENTS ?= -n 2

.DEFAULT_GOAL := help
.PHONY: help demo test lint types tests matrix bench setup clean

help:
	@echo "make demo    build a small bundle, run it, show what came of it"
	@echo "make test    lint, types and all tests"
	@echo "make matrix  the tables of tests/runtimes on all runtimes and engines: docs/compatibility.md;"
	@echo "             all tests on other Pythons, and on the newest kernel"
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

# All of it, or a share as MATRIX=3/12; the log stays.  Only all of it is written to the document.
MATRIX ?= all
matrix: setup
	@mkdir -p .cache/matrix
	@$(if $(filter all,$(MATRIX)),rm -f .cache/matrix/outcomes)
	SANDBOXFS_MATRIX=$(MATRIX) $(PYTHON) -m pytest $(PYTEST_ARGUMENTS) \
		-m $(if $(filter all,$(MATRIX)),"combination or matrix",matrix) \
		tests/runtimes tests/guest tests/pythons >.cache/matrix/log 2>&1; \
		status=$$?; tail -n 40 .cache/matrix/log; \
		$(if $(filter all,$(MATRIX)),$(PYTHON) -m tests.runtimes.compatibility;) exit $$status

bench: setup
	$(PYTHON) -m benchmarks

setup:
	@tools/setup test

clean:
	rm -rf .venv .cache .hypothesis .pytest_cache .mypy_cache .ruff_cache dist build
	find sandboxfs tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
