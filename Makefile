# Each target sets up what it needs: a virtual environment in .venv, made anew when requirements.txt changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: sim test lint bench-route bench-turn bench-checks clean

# The whole system on this machine: local cloud, autoscaler, loadbalancer, users, report.
sim: $(READY)
	$(BIN)/python sim.py --local

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-route: $(READY)
	$(BIN)/python -m bench.route --json build/bench-route.json

bench-turn: $(READY)
	$(BIN)/python -m bench.turn --json build/bench-turn.json

bench-checks: $(READY)
	$(BIN)/python -m bench.checks --json build/bench-checks.json

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache

$(READY): requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
