# make run: sets up and runs the embedded experiment. make test: sets up and passes the tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test lint types check-all clean
.DEFAULT_GOAL := run

run: .venv/ready
	$(BIN)/saefw run registry.yaml

test: .venv/ready lint types
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

# Everything, minutes long: also the slow tests, among them the embedded experiment and the truth of its findings;
# then that experiment stopped 20 times at random moments.
check-all: test
	$(BIN)/python -m pytest -q -m slow
	$(BIN)/python scripts/break_runs.py

# The set-up: an environment of our own with the pinned versions; done again when what it hangs on changes.
.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "saefw needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv runs dist
