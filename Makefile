# Everything runs in .venv, which is made and kept up to date on the way.
#
#   PYTHON=python3.12          the Python of a new .venv
#   PIP_ARGS="--option ..."    for every `pip install`, such as an index of CPU-only builds of torch
#   ARGS="--option ..."        for the program that a target runs
#   WORKERS=                   `make test` in one process, as for a debugger
#   SPARSEKERN_CUDA=off        and other settings of the build (see setup.py); `make clean` before a change of them
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = pip==26.3
# Files stay whole, as some build what all of their tests use, and in order: short lists of long tests would come last.
# Threads that wait would keep other workers from the CPUs.
WORKERS ?= -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
CXX_FILES := $(shell find csrc -type f)

# For setup.py, which runs the pinned cmake and ninja.
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help build cutlass demo test bench lint format wheel clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: build/editable.stamp ## compile the kernels and install the package in editable mode

cutlass: $(VENV)/pip.stamp ## CUTLASS's headers, before a build with CUDA: 2:4 on Hopper, for some minutes more
	$(BIN)/pip install --no-deps $(PIP_ARGS) --group cutlass
	rm -f build/editable.stamp

demo: build ## train a network dense and sparse, and compare
	$(BIN)/python examples/train_vision.py $(ARGS)

test: build $(VENV)/dev.stamp ## run the tests
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest $(WORKERS) $(ARGS)

bench: build ## measure the products against dense torch and peers, into bench/results
	$(BIN)/python bench/run.py $(ARGS)

lint: $(VENV)/dev.stamp ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/dev.stamp ## rewrite the sources in the house style
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

wheel: $(VENV)/demo.stamp ## build dist/sparsekern-*.whl
	rm -rf build/lib* build/bdist* dist
	$(BIN)/pip wheel . --no-deps --wheel-dir dist

clean: ## remove what was built
	rm -rf build dist python/*.egg-info python/sparsekern/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis

distclean: clean ## remove .venv too
	rm -rf $(VENV)

# --no-build-isolation: with the pinned tools. ninja compiles only what changed, through ccache where that is installed.
build/editable.stamp: CMakeLists.txt setup.py pyproject.toml $(CXX_FILES) $(VENV)/demo.stamp
	$(BIN)/pip install --no-deps --no-build-isolation --editable .
	@mkdir -p $(@D) && touch $@

# A dependency group of pyproject.toml.
$(VENV)/%.stamp: pyproject.toml $(VENV)/pip.stamp
	$(BIN)/pip install $(PIP_ARGS) --group $*
	@touch $@

# What cannot be installed from here is looked for before anything is downloaded.
$(VENV)/pip.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null || \
	  { echo "error: PYTHON must be Python 3.10 or newer, got $(PYTHON): $$($(PYTHON) --version 2>&1)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || \
	  { echo "error: $(PYTHON) must have the venv module (Debian: apt-get install python3-venv), got none" >&2; exit 1; }
	@for name in $${CXX:-c++ g++ clang++}; do command -v $$name > /dev/null && exit; done; \
	  echo "error: a C++17 compiler is needed (Debian: apt-get install g++, or set CXX), got none" >&2; exit 1
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP_ARGS) $(PIP)
	@touch $@
