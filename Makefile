# `make demo` and `make test` work on a fresh machine: they set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
export PYTHONPATH := .

.PHONY: setup demo study test lint format bench
setup: .venv/.ready
.venv/.ready: requirements.txt requirements-data.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --require-hashes -r requirements-data.txt
	touch $@

demo: setup
	$(BIN)/python launch.py --config=configs/regression.py:demo --workdir=runs/demo --sweep
	@echo "Open runs/demo/report/report.html"

study: setup
	$(BIN)/python launch.py --config=configs/regression.py --workdir=runs/regression --sweep

test: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	QLORA_JAX_TYPECHECK=1 $(BIN)/python -m pytest -n 2

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench: setup
	$(BIN)/python benchmarks/routed_step.py
	$(BIN)/python benchmarks/vectorised_sweep.py
