PYTHONS ?= 3.11 3.12 3.13 3.14
VENV ?= .venv
TORCH ?= torch
TESTS ?=
BIN := $(VENV)/bin
SETUP := $(VENV)/.installed
LOCKED := constraints/locked.txt
OLDEST := constraints/oldest.txt
BENCH = CUDA_VISIBLE_DEVICES= $(BIN)/python -m benchmarks.harness
RESULTS := benchmarks/results/step_time
SUITABLE := import ensurepip, sys; sys.exit("%d.%d" % sys.version_info[:2] != sys.argv[1])
LOCK := $(BIN)/uv pip compile --quiet --no-header --upgrade --universal --python-version 3.11 --fork-strategy fewest \
    --all-extras pyproject.toml

# $(call environment,FOLDER,OPTIONS OF PIP): autopart and its tools in an environment, which is made with the first
# Python of $(PYTHONS) that is here. What builds autopart is installed first, within the constraints too.
define environment
	@test -x $(1)/bin/python || { \
	    for version in $(PYTHONS); do \
	        for python in python$$version $$HOME/.pyenv/versions/$$version*/bin/python python3; do \
	            if $$python -c '$(SUITABLE)' $$version 2>/dev/null; then break 2; fi; python=; \
	        done; \
	    done; \
	    test -n "$$python" || { echo "autopart needs Python with venv, one of: $(PYTHONS)" >&2; exit 1; }; \
	    echo "Creating $(1) with $$($$python --version)"; \
	    $$python -m venv $(1); \
	}
	@echo "Installing autopart and its tools into $(1) (some minutes)"
	@$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(2) setuptools
	@$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(2) --no-build-isolation "$(TORCH)" -e ".[dev]"
	@touch $(1)/.installed
endef

.DEFAULT_GOAL := help
.PHONY: help setup demo quick test latest oldest check golden figures bench lock gpu clean

help:  ## list the targets
	@sed -nE 's/^([a-z]+):.*## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(SETUP)

$(SETUP): pyproject.toml $(LOCKED)
	$(call environment,$(VENV),-c $(LOCKED))

.venv-oldest/.installed: pyproject.toml $(OLDEST)
	$(call environment,.venv-oldest,-c $(OLDEST))

demo: setup  ## partition and train a small model
	@$(BIN)/python examples/demo.py

quick: setup  ## run a sample of every table of tests, nothing slow
	$(BIN)/python -m pytest --quick $(TESTS)

test: setup  ## run every test
	$(BIN)/python -m pytest $(TESTS)

latest:  ## run every test on the newest versions that pyproject.toml allows
	$(call environment,.venv-latest,--upgrade --upgrade-strategy eager)
	.venv-latest/bin/python -m pytest $(TESTS)

oldest: .venv-oldest/.installed  ## run every test on the oldest versions that pyproject.toml allows
	.venv-oldest/bin/python -m pytest $(TESTS)

check: setup  ## lint, format, types and import layering
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n 0 tests/test_layering.py

golden: setup  ## renew the golden files
	AUTOPART_GOLDEN=renew $(BIN)/python -m pytest -n 0 tests/passes/test_golden.py

lock: setup  ## renew constraints/: the newest versions that are allowed, with the torch that was measured, and the oldest
	echo torch==2.13.0 | $(LOCK) -c - -o $(LOCKED)
	$(LOCK) -o $(OLDEST) --resolution lowest-direct

figures: setup  ## renew the tables and drawings of the documents from the last results
	$(BIN)/python scripts/rooms.py
	$(BIN)/python -m benchmarks.figures

bench: setup  ## time steps of both models on 2 and 4 ranks beside other systems, renew the tables
	@profiles=$$(mktemp -d); trap 'rm -r $$profiles' EXIT; \
	for model in gpt2 llama; do \
	    $(BENCH) --ranks 2 --model $$model --rounds 8 --warm-up 2 \
	        --profile $$profiles/2.toml --json $(RESULTS)_$${model}_2.json || exit 1; \
	    $(BENCH) --ranks 4 --model $$model --layers 8 --sequence 64 --rounds 6 --warm-up 2 \
	        --profile $$profiles/4.toml --json $(RESULTS)_$${model}_4.json || exit 1; \
	done
	$(BIN)/python -m benchmarks.figures

gpu: setup  ## run the GPU tests and benchmarks, where there is a GPU
	scripts/gpu.sh

clean:  ## remove the environment and all caches
	rm -rf .venv .venv-latest .venv-oldest .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find autopart examples tests -name __pycache__ -prune -exec rm -rf {} +
