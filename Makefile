# Every target does its own set-up: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
OLDEST_PYTHON ?= $(shell python3.10 -c 'import sys; print(sys.executable)' 2>/dev/null || echo $(PYTHON))
EXTRAS := .[dev,train,viz,hf,trl]
OF_VERSIONS := (not slow or hf) and not gpu and not multi_gpu

.PHONY: train serve test test-all test-hf test-latest test-oldest test-gpu check format verify fuzz mutants bench-planner bench-cpu bench-kernels clean

train: .venv/ready  ## the main job: context-parallel training on real text
	$(BIN)/python launch/train.py

test: .venv/ready  ## the tests that need no GPU
	$(BIN)/pytest -n $(WORKERS) -m "not slow and not gpu and not multi_gpu"

test-all: .venv/ready  ## the full matrix
	$(BIN)/pytest -n $(WORKERS) -m "not gpu and not multi_gpu"

test-hf: .venv/ready  ## models of transformers, the full matrix
	$(BIN)/pytest -n $(WORKERS) -m "hf and not gpu"

test-latest: .venv/ready  ## quick tests and those of models, with the newest releases of everything
	$(BIN)/uv venv --quiet --clear --python $(PYTHON) .venv-latest
	$(BIN)/uv pip install --python .venv-latest --editable '$(EXTRAS)'
	.venv-latest/bin/pytest -n $(WORKERS) -m "$(OF_VERSIONS)"
	.venv-latest/bin/python tests/integrations/support_matrix.py --ran test-latest

test-oldest: .venv/ready  ## the same with the oldest that pyproject.toml allows
	$(BIN)/uv venv --quiet --clear --python $(OLDEST_PYTHON) .venv-oldest
	$(BIN)/uv pip install --python .venv-oldest --resolution lowest-direct --editable '$(EXTRAS)'
	.venv-oldest/bin/pytest -n $(WORKERS) -m "$(OF_VERSIONS)"
	.venv-oldest/bin/python tests/integrations/support_matrix.py --ran test-oldest

test-gpu:  ## the kernels on a GPU: by .venv if it sees one, else by the machine's own python, where nothing is installed
	@for python in $(BIN)/python $(PYTHON); do \
	  if "$$python" -c 'import einops, numpy, pytest, torch, triton; assert torch.cuda.is_available()' 2>/dev/null; then \
	    echo "$$python sees a GPU"; exec "$$python" -m pytest -m gpu tests/gpu; \
	  fi; \
	done; \
	echo "neither $(BIN)/python nor $(PYTHON) has einops, numpy, pytest, triton and a torch that sees a GPU"; exit 1

check: .venv/ready  ## format, lint, types and the quick tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/pytest -n $(WORKERS) -q -m "not slow and not gpu and not multi_gpu"

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

serve: .venv/ready  ## prompts answered by a tiny model whose keys lie on all ranks, and by one rank alone
	printf '%s\n' 'The quick brown fox' 'Once upon a time there was' | \
	  $(BIN)/python launch/serve.py --model hf:launch/configs/gemma3.json --check

verify: .venv/ready  ## N ranks equal one, on this machine
	$(BIN)/python launch/verify.py

fuzz: .venv/ready  ## 10,000 random attentions against the oracle
	$(BIN)/python tests/fuzz.py --cases 10000 --seed 0 --record benchmarks/results/fuzz.json

mutants: .venv/ready  ## every planted bug is caught by the tests
	$(BIN)/python tests/mutants.py --table docs/mutants.md

bench-planner: .venv/ready
	$(BIN)/python benchmarks/planner.py

bench-cpu: .venv/ready
	$(BIN)/python benchmarks/cpu_peers.py

bench-kernels: .venv/ready  ## the fused kernels beside their peers, on a GPU
	$(BIN)/python launch/bench.py kernels

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '$(EXTRAS)'
	touch $@

clean:
	rm -rf .venv .venv-latest .venv-oldest runs dist build
