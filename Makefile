# make serve    a server on 127.0.0.1:8835 with the default model, until Ctrl-C
# make test     everything installed and the tests passed
# make check    formatting, lint, types, architecture; writes nothing
# make fix      what can be mended by itself
# make test-reference  the tests once more, without the native kernels
# make sanitize the tests of the native kernels under the address and undefined sanitizers
#
# TORCH_INDEX   where torch comes from if not from pip's own index, for example
#               make install TORCH_INDEX=https://download.pytorch.org/whl/cpu
# EXTRAS        what is installed beside the server: EXTRAS= leaves the tests' packages out

PYTHON ?= python3
TORCH_INDEX ?=
EXTRAS ?= test
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := torch==2.13.0

.DEFAULT_GOAL := help
.PHONY: help install serve test test-reference check fix sanitize clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

install: $(VENV)/installed

# The text-generation client wants an older huggingface-hub than transformers: it lives apart.
$(VENV)/installed: pyproject.toml constraints.txt CMakeLists.txt $(wildcard llm_serving/kernels/cpu/csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(PIP) install --quiet --no-deps --index-url $(TORCH_INDEX) $(TORCH))
	$(PIP) install --quiet -c constraints.txt -e '.$(if $(EXTRAS),[$(EXTRAS)])'
	$(if $(EXTRAS),$(PIP) install --quiet --no-deps --upgrade --target $(VENV)/clients -c constraints.txt text-generation==0.7.0)
	@touch $@

serve: install
	$(BIN)/llm-serving serve --config configs/smollm2_135m.yaml

test: install
	$(BIN)/python -m pytest

# What a machine without a compiler runs; what is about the native kernels alone is skipped.
test-reference: install
	LLM_SERVING_INSTRUCTION_SET=none $(BIN)/python -m pytest

check: install
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy --no-error-summary
	$(BIN)/python -m pytest -q tests/test_architecture.py

fix: install
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format --quiet .

# A copy of the tree holds the module, so that the one in use stays.  Python itself is not sanitized: the
# runtimes come first, and its own leaks are not looked at.  Without -S the editable install would bring the
# module in use.  What pip brings only while it builds the package has to be there to build beside it.
SANITIZED := build/sanitize
sanitize: install
	$(PIP) install --quiet 'nanobind>=2.4' cmake ninja
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B $(SANITIZED) -DSANITIZE=ON \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python -DMODULE_DIRECTORY=$(CURDIR)/$(SANITIZED)/tree/llm_serving/kernels/cpu
	PATH="$(abspath $(BIN)):$$PATH" cmake --build $(SANITIZED) --parallel
	tar -c --exclude='_native*.so' llm_serving tests performance_serving pyproject.toml | tar -x -C $(SANITIZED)/tree
	cd $(SANITIZED)/tree && PYTHONPATH="$$PWD:$$($(abspath $(BIN))/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  $(abspath $(BIN))/python -S -m pytest -q --capture=sys tests/test_cpu_linear.py tests/test_cpu_tiles.py \
	  tests/test_cpu_attention.py tests/test_cpu_elementwise.py tests/test_cpu_sampling.py \
	  tests/test_cpu_pages.py tests/test_packed_model.py

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
