# Everything runs in .venv, made on first use. What is installed is remembered by stamp files, so that a
# second `make demo` starts at once.
#
# On a machine without a GPU where pip would fetch PyTorch with CUDA (several GB), name an index of CPU
# builds once: make demo TORCH_FLAGS="--index-url ..."

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := torch==2.13.0
TORCH_FLAGS ?=

.PHONY: demo test test-fast test-all check bench clean

demo: $(VENV)/.core
	$(BIN)/plait train stdlib_demo

# A process for each core, each computing on one thread; tests that need more ask for them.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

test: $(VENV)/.test
	$(PYTEST) -m "not gpu and not exhaustive"

test-fast: $(VENV)/.test
	$(PYTEST) -m "not gpu and not slow and not exhaustive"

test-all: $(VENV)/.test
	$(PYTEST)

check: $(VENV)/.test $(VENV)/.check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest tests/architecture

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.parity
	$(BIN)/python -m benchmarks.strict
	$(BIN)/python -m benchmarks.families
	$(BIN)/python -m benchmarks.compile_time
	$(BIN)/python -m benchmarks.step_time
	$(BIN)/python -m benchmarks.compile_time --level O1
	$(BIN)/python -m benchmarks.compile_time --level O2
	$(BIN)/python -m benchmarks.step_time --level O1
	$(BIN)/python -m benchmarks.step_time --level O2
	$(BIN)/python -m benchmarks.operators
	$(BIN)/python -m benchmarks.operators --part products
	$(BIN)/python -m benchmarks.operators --part optimizers
	$(BIN)/python -m benchmarks.overlap --price
	$(BIN)/python -m benchmarks.dryrun_scale
	$(BIN)/python -m benchmarks.overlap
	$(BIN)/python -m benchmarks.overlap --batches
	$(BIN)/python -m benchmarks.overlap --level O1
	$(BIN)/python -m benchmarks.dryrun_accuracy
	$(BIN)/python -m benchmarks.train_throughput
	$(BIN)/python -m benchmarks.train_throughput --level O1
	$(BIN)/python -m benchmarks.finetune
	$(BIN)/python -m benchmarks.finetune --level O1
	$(BIN)/python -m benchmarks.data_loading
	$(BIN)/python -m benchmarks.bits_per_byte
	$(BIN)/python -m benchmarks.fresh_clone
	$(BIN)/python -m benchmarks.readme_table

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "plait needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "python cannot make a virtual environment; on Debian: apt install python3-venv"; exit 1; }

# Says so, before it happens, if pip is about to fetch PyTorch with CUDA on a machine without a GPU.
WARN_OF_CUDA = command -v nvidia-smi >/dev/null || [ -n "$(TORCH_FLAGS)" ] || \
	! $(PIP) install -q --dry-run --report - $(TORCH) 2>/dev/null | grep -q '"nvidia-' || \
	echo 'note: there is no GPU here, but pip is about to fetch several GB of CUDA packages.' \
	'To avoid them stop now and type: make demo TORCH_FLAGS="--index-url <an index of CPU builds>"'

# PyTorch goes first and alone: with it in place nothing later pulls in another build.
$(VENV)/.core: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -q -c constraints.txt setuptools wheel
	@$(WARN_OF_CUDA)
	$(PIP) install -q -c constraints.txt $(TORCH_FLAGS) $(TORCH)
	$(PIP) install -q -c constraints.txt --no-build-isolation -e .
	touch $@

$(VENV)/.test: $(VENV)/.core
	$(PIP) install -q -c constraints.txt --no-build-isolation -e .[test]
	touch $@

# SimPEG's source distribution takes its version from a build environment of its own.
$(VENV)/.bench: $(VENV)/.test
	$(PIP) install -q -c constraints.txt simpeg
	$(PIP) install -q -c constraints.txt --no-build-isolation -e .[bench]
	touch $@

$(VENV)/.check: $(VENV)/.core
	$(PIP) install -q -c constraints.txt --no-build-isolation -e .[check]
	touch $@
