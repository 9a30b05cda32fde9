# make demo: train a real language model on real text on this machine. make test: prove the core. Both install what they need.
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
EXPORT := exports/demo
PYTEST := $(BIN)/python -m pytest -n 2

.PHONY: demo test test-slow test-all test-minimum lint format bench bench-gpu docs clean

demo: .venv/core
	$(BIN)/scale train configs/demo.yaml
	$(BIN)/scale plot $(DEMO)
	$(BIN)/scale generate $(DEMO) --prompt "    def __init__(self" --prompt "class Reader(" --max-new-tokens 60 --temperature 0.7
	rm -rf $(EXPORT)
	$(BIN)/scale export $(DEMO) --out $(EXPORT)
	$(BIN)/python examples/check_export.py $(DEMO) $(EXPORT)

test: .venv/dev
	$(PYTEST) -m "not slow and not gpu"

test-slow: .venv/dev
	$(PYTEST) --dist loadfile -m "slow and not gpu"  # one worker a file: only one Ray, one Slurm at a time

test-all: test test-slow

test-minimum: .venv-minimum/dev  # the lowest declared versions; torch 2.11 brings its CUDA libraries: 6 GB, minutes to install
	.venv-minimum/bin/python -m pytest -n 2 -m "not slow and not gpu"

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/dev
	$(BIN)/python benchmarks/train_step.py

bench-gpu: .venv/dev
	PYTHON=$(BIN)/python benchmarks/gpu_suite.sh

docs: .venv/dev
	$(BIN)/python -m scale.config.reference > docs/configuration.md

clean:
	rm -rf .venv .venv-minimum build *.egg-info  # never runs, exports or data

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/core: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

.venv/dev: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@ .venv/core

.venv-minimum/dev: pyproject.toml constraints-minimum.txt
	[ -x .venv-minimum/bin/python ] || $(PYTHON) -m venv .venv-minimum
	.venv-minimum/bin/pip install -q -c constraints-minimum.txt -e '.[dev]'
	touch $@
