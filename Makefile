# Every target does its own set-up: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2

.PHONY: train test test-all test-gpu check format verify bench-planner bench-cpu clean

train: .venv/ready  ## the main job: context-parallel training on real text
	$(BIN)/python launch/train.py

test: .venv/ready  ## the tests that need no GPU
	$(BIN)/pytest -n $(WORKERS) -m "not slow and not gpu and not multi_gpu"

test-all: .venv/ready  ## the full matrix
	$(BIN)/pytest -n $(WORKERS) -m "not gpu and not multi_gpu"

test-gpu: .venv/ready  ## the kernels on a GPU
	$(BIN)/pytest -m gpu

check: .venv/ready  ## format, lint, types and the quick tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/pytest -n $(WORKERS) -q -m "not slow and not gpu and not multi_gpu"

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

verify: .venv/ready  ## N ranks equal one, on this machine
	$(BIN)/python launch/verify.py

bench-planner: .venv/ready
	$(BIN)/python benchmarks/planner.py

bench-cpu: .venv/ready
	$(BIN)/python benchmarks/cpu_peers.py

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,train,viz]'
	touch $@

clean:
	rm -rf .venv runs dist build
