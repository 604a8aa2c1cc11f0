# Everything a developer or a newcomer runs. Each target installs what it needs into .venv first.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := $(shell find csrc -type f)
# One thread per worker and as many workers as cores: the suite is many small tests.
WORKERS ?= $(shell nproc)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup

.PHONY: install demo test test-all test-interpret test-host-cuda bench gpu-check docs lint clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt setup.py robattr_fast/build.py $(SOURCES)
	$(PYTHON) -m venv .venv
	$(PIP) pip setuptools wheel ninja
	$(PIP) torch numpy
	$(PIP) --no-build-isolation -e ".[cli,demo,triton,test,bench,lint]"
	touch $@

demo: install
	$(BIN)/robattr-fast certify chelsea --model demo --samples 2048 --out out

# Everything on a small scale, within four minutes on two cores.
test: install
	$(PYTEST) -m "not slow" tests
	@$(MAKE) --no-print-directory test-interpret SELECT="not slow"

# The same, and what is only larger: what CI runs.
test-all: install
	$(PYTEST) tests
	@$(MAKE) --no-print-directory test-interpret

# Triton's interpreter patches the language for the whole process: its tests run in one of their own. What is left out
# tests formulas of autograd, the same on every backend, or rows made to mislead the sampling of the CPU kernels.
INTERPRETED := $(patsubst kernels/%,tests/test_%,$(filter-out kernels/_%,$(wildcard kernels/*.py))) tests/test_forward_mode.py
ELSEWHERE := not gradient and not long and not derivative and not one_tensor and not autocast and not misleads \
  and not bound_of_the_sample
test-interpret: install
	TRITON_INTERPRET=1 $(PYTEST) -m "$(SELECT)" -k "triton and $(ELSEWHERE)" $(INTERPRETED)

# Every case of the CPU kernels through the CUDA kernels on the host; `make test` takes the shorter ones.
test-host-cuda: install
	$(PYTEST) tests/test_host_machine.py tests/test_host_cuda.py

# Adds to benchmarks/records/; close everything else that runs. ARGS='--quick', '--only P2', '--base HEAD~1'.
bench: install
	$(BIN)/python -m benchmarks $(ARGS)

# On a machine with a GPU, by the Python that has its torch; nothing is installed. ARGS='correct', '--wheel dist/X.whl'.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check $(ARGS)

# Tables and plot of the documents, from the records.
docs: install
	$(BIN)/python -m benchmarks render

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

clean:
	rm -rf .venv build dist out *.egg-info robattr_fast/*.so
