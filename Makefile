.PHONY: help install test bench list gpu world train lint mutants clean
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= runs/gpu-$(shell date +%Y%m%d-%H%M%S)
WORLD := runs/world

help:  ## show the commands
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

# pip says nothing for minutes; a line every half minute shows that it is alive.
$(STAMP): setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV)"
	@( while sleep 30; do echo "still installing"; done ) & ticking=$$!; \
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,nuscenes]'; status=$$?; \
	kill $$ticking; exit $$status
	touch $@

install: $(STAMP)  ## make the environment in .venv

test: $(STAMP) lint  ## style, and every test that needs no GPU
	$(BIN)/pytest -n 2
	$(BIN)/pytest -n 2 --compile-only

bench: $(STAMP)  ## compare V1, as documented and as one writes it today, with V2: equality, speed, memory
	$(BIN)/python bench/run.py --compare v1 v1-sdpa v2

list: $(STAMP)  ## show everything that can be measured
	$(BIN)/python bench/run.py --list

gpu:  ## on a GPU, nothing installed: ten minutes of tests and measurements, packed into one archive
	$(PYTHON) bench/gpu_day.py --out $(OUT)

$(WORLD)/summary.json: | $(STAMP)
	$(BIN)/python train/tools/make_world.py --out $(WORLD)

world: $(WORLD)/summary.json  ## make runs/world, a generated town in nuScenes' format

TRAIN = $(BIN)/torchrun --nproc-per-node 2 train/main.py --data $(WORLD) --resume auto
WEIGHTS = model.backbone.weights=work_dirs/depth_tiny/checkpoints/best.pt

train: world  ## train depth_tiny, then completion_v3_tiny on its features, in two processes on runs/world
	$(TRAIN) --config depth_tiny
	$(TRAIN) --config completion_v3_tiny --cfg-options $(WEIGHTS) loader.batch_size=2

lint: $(STAMP)  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

mutants: $(STAMP)  ## plant a few faults into a copy of the code, one at a time, and see which the tests miss
	$(BIN)/python tests/mutants.py

clean:  ## remove the environment and what tools left behind
	rm -rf $(VENV) build *.egg-info .pytest_cache .benchmarks
