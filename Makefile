.PHONY: install test bench clean
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

help:  ## show the commands
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(STAMP): setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,nuscenes]'
	touch $@

install: $(STAMP)  ## make the environment in .venv

test: $(STAMP)  ## run every test that needs no GPU
	$(BIN)/pytest -n 2
	$(BIN)/pytest -n 2 --compile-only

bench: $(STAMP)  ## compare V1 with V2: memory, speed, equality
	$(BIN)/python bench/run.py --compare v1 v2

clean:  ## remove the environment and what tools left behind
	rm -rf $(VENV) build *.egg-info .pytest_cache .benchmarks
