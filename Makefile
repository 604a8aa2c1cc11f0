# Everything a developer or a newcomer runs. `make demo` and `make test` install what they need into .venv first.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := $(shell find csrc -type f)
# One thread per worker and as many workers as cores: the suite is many small tests.
WORKERS ?= $(shell nproc)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

.PHONY: install demo test test-interpret test-host-cuda bench gpu-check docs lint clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt setup.py robattr_fast/build.py $(SOURCES)
	$(PYTHON) -m venv .venv
	$(PIP) pip setuptools wheel ninja
	$(PIP) torch numpy
	$(PIP) --no-build-isolation -e ".[cli,demo,triton,test,bench,lint]"
	touch $@

demo: install
	$(BIN)/robattr-fast certify chelsea --model demo --samples 2048 --out out

test: install
	$(PYTEST) -n $(WORKERS) --dist loadgroup tests
	$(MAKE) --no-print-directory test-interpret

# Triton's interpreter patches the language for the whole process: its tests run in one of their own. What is left out
# tests formulas of autograd, the same on every backend, or rows made to mislead the sampling of the CPU kernels.
INTERPRETED := $(addprefix tests/test_,$(addsuffix .py,betting_bounds count_sparsified linear_attention \
  mlp_smoothgrad noisy_samples packed_gram soft_topk sparsify topk_threshold))
ELSEWHERE := not gradient and not long and not derivative and not one_tensor and not autocast and not misleads \
  and not bound_of_the_sample
test-interpret: install
	TRITON_INTERPRET=1 $(PYTEST) -n $(WORKERS) -k "triton and $(ELSEWHERE)" $(INTERPRETED)

# Every case of the CPU kernels through the CUDA kernels on the host; `make test` takes the shorter ones.
test-host-cuda: install
	ROBATTR_FAST_EVERY_CASE=1 $(PYTEST) -n $(WORKERS) tests/test_host_machine.py tests/test_host_cuda.py

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
