# Everything a developer or a newcomer runs. `make demo` and `make test` install what they need into .venv first.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := $(shell find csrc -type f)
# One thread per worker and as many workers as cores: the suite is many small tests.
WORKERS ?= $(shell nproc)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

.PHONY: install demo test test-interpret lint clean

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
	$(PYTEST) -n $(WORKERS) tests
	$(MAKE) --no-print-directory test-interpret

# Triton's interpreter patches the language for the whole process: its tests run in one of their own.
test-interpret: install
	TRITON_INTERPRET=1 $(PYTEST) -n $(WORKERS) -k "triton and not grad and not long" \
		tests/test_noisy_samples.py tests/test_soft_topk.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

clean:
	rm -rf .venv build dist out *.egg-info robattr_fast/*.so
