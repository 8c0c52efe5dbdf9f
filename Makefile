# Everything a fresh machine needs: `make demo` and `make test`. Each target makes .venv by itself and installs nothing
# that is up to date.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test lint bench chaos experiments clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# spconv-cu120 has no wheel for Python 3.12 and later; both run on a CPU, too.
SPCONV := $(shell $(PYTHON) -c 'import sys; print("cu120" if sys.version_info < (3, 12) else "cu126")')
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

demo: .venv/demo.stamp
	$(BIN)/python pipelines/demo.py

test: .venv/dev.stamp
	$(BIN)/python -m pytest

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/dev.stamp
	$(BIN)/python pipelines/bench.py
	$(BIN)/python pipelines/bench_predict.py --page BENCHMARKS.md
	$(BIN)/python pipelines/bench_backbones.py --page BENCHMARKS.md
	$(BIN)/python pipelines/bench_listing.py --page BENCHMARKS.md
	OMP_NUM_THREADS=1 $(BIN)/python pipelines/bench_links.py --page BENCHMARKS.md
	OMP_NUM_THREADS=1 $(BIN)/python pipelines/bench_reading.py --scenes 24 --page BENCHMARKS.md
	$(BIN)/python pipelines/bench_dask.py --page BENCHMARKS.md

# A quarter of an hour on two cores: 1 000 kills, full disks, damaged files, clocks, two writers; and the readers fuzzed.
chaos: .venv/dev.stamp
	$(BIN)/python tests/chaos/run.py
	$(BIN)/python tests/fuzz/run.py --seconds 120

# Two hours on two cores: 3 distillations, and 27, 18 and 45 trainings.
experiments: .venv/dev.stamp
	$(BIN)/python pipelines/experiments.py
	$(BIN)/python pipelines/backbone_experiment.py
	$(BIN)/python pipelines/rate_curve.py

clean:
	rm -rf .venv demo experiments build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/demo.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --editable '.[demo,$(SPCONV)]'
	touch $@

# torch-scatter has no wheels: it is built against the torch that is already there. Without a C++ compiler the tests
# that compare it with the native path skip.
.venv/dev.stamp: .venv/demo.stamp
	$(PIP) --editable '.[dev,$(SPCONV)]'
	printf '[build_ext]\nparallel = 2\n' > .venv/build.cfg
	CFLAGS='-O2 -g0' DIST_EXTRA_CONFIG=$(CURDIR)/.venv/build.cfg $(PIP) --no-build-isolation torch-scatter \
	  || echo 'torch-scatter could not be built: its tests will skip'
	touch $@
