# make demo       GRPO with four rewards on the tiny world, one figure, one table
# make test       ruff and the test suite
# make quick      the quick tests, in under two minutes
# make test-gpu   the tests that need CUDA
# make bench      time the phases of a step on the tiny world
#
# PIP_ARGS goes to pip, e.g. for another build of torch; PYTHON names the interpreter.

PYTHON ?= python3
PIP_ARGS ?=
BIN = .venv/bin
PIP = $(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS)

.PHONY: demo test quick test-gpu bench clean

demo: .venv/installed
	$(BIN)/python -m tools.demo

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

quick: .venv/installed-test
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-gpu: .venv/installed-test
	$(BIN)/python -m pytest -m gpu -s

bench: .venv/installed
	$(BIN)/python -m tools.bench

# torch first and alone: a later, looser requirement then finds the pinned build in place.
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PIP) "$$(grep '^torch==' requirements.txt)"
	$(PIP) -r requirements.txt
	touch $@

.venv/installed-test: .venv/installed requirements-test.txt
	$(PIP) -r requirements.txt -r requirements-test.txt
	touch $@

clean:
	rm -rf .venv out cache .pytest_cache .ruff_cache
