# `make demo` and `make test` work on a fresh machine: they set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install -q --disable-pip-version-check
export PYTHONPATH := .

.PHONY: setup setup-dev setup-llm setup-tpu demo demo-llm study study-language study-small figures test test-fast \
  mutants lint format bench
setup: .venv/.ready
.venv/.ready: requirements.txt requirements-data.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --no-compile -r requirements.txt
	$(PIP) --no-compile --no-deps --require-hashes -r requirements-data.txt
	touch $@

setup-llm: .venv/.ready-llm
.venv/.ready-llm: .venv/.ready requirements-llm.txt
	$(PIP) --no-deps --require-hashes -r requirements-llm.txt
	touch $@

setup-dev: .venv/.ready-dev
.venv/.ready-dev: .venv/.ready-llm requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	touch $@

# The TPU compiler for `launch.py --plan`, in a folder that only the plan reads (690 MB).
setup-tpu: .venv/libtpu/.ready
.venv/libtpu/.ready: .venv/.ready requirements-tpu.txt
	rm -rf .venv/libtpu
	$(PIP) --no-compile --no-deps --require-hashes --target .venv/libtpu \
	  -r requirements-tpu.txt
	touch $@

demo: setup
	$(BIN)/python launch.py --config=configs/regression.py:demo --workdir=runs/demo --sweep
	@echo "Open runs/demo/report/report.html"

# In a terminal the dialogue waits for you; elsewhere it answers the three lines.
demo-llm: setup-llm
	$(BIN)/python launch.py --config=configs/llm.py:demo --workdir=runs/demo-llm
	@if [ -t 0 ] && [ -t 1 ]; then \
	  $(BIN)/python -m qlora_jax.generate --adapter=runs/demo-llm/adapter \
	    --instruction="Write the plural of the word."; \
	else \
	  printf '%s\n' "/instruction Write the plural of the word." berry \
	    "/instruction Write the first letter of the word." berry "/adapter off" berry \
	    | $(BIN)/python -m qlora_jax.generate --adapter=runs/demo-llm/adapter --max_tokens=16; \
	fi

# The same command continues a stopped study. `study` is regression, about three and a half hours on
# two cores; `study-language` needs the weights and the data of instruction-induction and GSM8K.
study: setup
	$(BIN)/python launch.py --config=configs/regression.py --workdir=runs/regression --sweep
	$(BIN)/python launch.py --config=configs/factorial.py --workdir=runs/factorial --sweep
	$(BIN)/python launch.py --config=configs/ablations.py --workdir=runs/ablations --sweep
	$(BIN)/python launch.py --config=configs/bases.py --workdir=runs/bases --sweep
	$(BIN)/python launch.py --config=configs/noise.py --workdir=runs/noise --sweep
	$(BIN)/python launch.py --config=configs/regression.py:stability --workdir=runs/stability --sweep
	$(BIN)/python -m experiments depth --workdir=runs/depth --results=runs/depth/tables
	$(BIN)/python -m experiments stream --workdir=runs/stream --results=runs/stream/tables

study-language: setup-llm
	$(BIN)/python launch.py --config=configs/llm.py:induction --workdir=runs/induction --sweep
	$(BIN)/python launch.py --config=configs/llm.py:reasons --workdir=runs/reasons --sweep
	$(BIN)/python launch.py --config=configs/llm.py:combined --workdir=runs/combined --sweep
	$(BIN)/python launch.py --config=configs/factorial_language.py --workdir=runs/factorial-language --sweep
	$(BIN)/python launch.py --config=configs/llm.py:all --workdir=runs/all-tasks --sweep
	$(BIN)/python launch.py --config=configs/llm.py:gsm8k --workdir=runs/gsm8k --sweep

study-small: setup
	$(BIN)/python launch.py --config=configs/regression.py:small --workdir=runs/small/regression --sweep
	$(BIN)/python launch.py --config=configs/factorial.py:runlocal --workdir=runs/small/factorial --sweep
	$(BIN)/python launch.py --config=configs/ablations.py:runlocal --workdir=runs/small/ablations --sweep
	$(BIN)/python launch.py --config=configs/noise.py:runlocal --workdir=runs/small/noise --sweep

figures: setup
	$(BIN)/python -m experiments figures

test: setup-dev setup-tpu lint
	QLORA_JAX_TYPECHECK=1 $(BIN)/python -m pytest -n 2

# What people run while they edit: no lint, nothing that trains for long.
test-fast: setup-dev
	QLORA_JAX_TYPECHECK=1 $(BIN)/python -m pytest -n 2 -m "not slow"

# Plants one-line faults and shows which the tests notice; 30 minutes on two cores, resumable.
mutants: setup-dev
	$(BIN)/python -m tests.mutants --out=runs/mutants.json --markdown=runs/mutants.md

lint: setup-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: setup-dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench: setup
	$(BIN)/python -m benchmarks.routed_step
	$(BIN)/python -m benchmarks.vectorised_sweep
	$(BIN)/python -m benchmarks.contraction
