.PHONY: help install test bench gpu lint clean
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

gpu:  ## on a GPU: its tests, the comparison, every operation against its peers
	pytest --gpu tests/kernels
	python bench/run.py --compare v1 v2 v1-fused v2-eager --device cuda
	for op in multi_depth_warp bev_warp cross_camera_attention window_bias_attention gated_fusion; do \
		python bench/run.py --op $$op --device cuda || exit 1; done

lint: $(STAMP)  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:  ## remove the environment and what tools left behind
	rm -rf $(VENV) build *.egg-info .pytest_cache .benchmarks
