TORCH ?= torch==2.13.0
PYTHONS := python3.11 python3.12 python3
SUITABLE := import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test check golden gpu clean

help:  ## list the targets
	@sed -nE 's/^([a-z]+):.*## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(STAMP)

$(STAMP): pyproject.toml
	@for python in $(PYTHONS); do \
	    if $$python -c '$(SUITABLE)' 2>/dev/null; then break; fi; python=; \
	done; \
	test -n "$$python" || { echo "autopart needs Python 3.11 or 3.12 with venv" >&2; exit 1; }; \
	echo "Creating .venv with $$python"; \
	$$python -m venv .venv
	@echo "Installing $(TORCH), then autopart and its tools, into .venv (some minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

demo: setup  ## partition and train a small model
	@$(BIN)/python examples/demo.py

test: setup  ## run every test
	$(BIN)/python -m pytest

check: setup  ## lint, format, types and import layering
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n 0 tests/test_layering.py

golden: setup  ## renew the golden files
	AUTOPART_GOLDEN=renew $(BIN)/python -m pytest -n 0 tests/test_golden.py

gpu: setup  ## run the GPU tests and benchmarks, where there is a GPU
	scripts/gpu.sh

clean:  ## remove the environment and all caches
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find autopart examples tests -name __pycache__ -prune -exec rm -rf {} +
