# `make quickstart` and `make test` set up everything they need in .venv; nothing else is touched.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Two processes take the tests file by file, so that what a file's tests share is made once; a thread each: two teams of threads on two
# cores wait for each other, and a test of 6 s took 300.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope
# Where DeepSpeed is installed its ranks abort if they are forked from a process that has compiled: its tests have a process of their own.
APART = tests/test_deepspeed.py

# What computes, once more as on a CPU with AVX2 alone: no AVX-512, no bf16 instructions.
NARROW = ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2
NUMERICS = tests/test_matmul.py tests/test_product_cpu.py tests/test_kernels.py tests/test_router.py tests/test_mixture.py \
	tests/test_generate.py tests/precision/test_fp8.py tests/precision/test_masters.py tests/depth/test_table.py
BF16 = tests/test_layouts.py tests/test_sequence.py tests/test_experts.py tests/test_spacetime.py

.PHONY: quickstart test test-narrow test-all check lint types docs clean

quickstart: $(VENV)/.ready
	$(BIN)/python tools/quickstart.py

test: $(VENV)/.ready
	$(PYTEST) --ignore=$(APART)
	$(BIN)/python -m pytest $(APART)

test-narrow: $(VENV)/.ready
	$(NARROW) $(PYTEST) $(NUMERICS)
	$(NARROW) $(PYTEST) $(BF16) -k "bf16 or (zbv and volume)"

test-all: $(VENV)/.ready
	$(PYTEST) --ignore=$(APART) -m "not gpu and not multigpu and not slurm"
	$(BIN)/python -m pytest $(APART) -m "slow or not slow"
	$(BIN)/python -m pytest -m slurm || [ $$? -eq 5 ] # 5: they were skipped

check: lint types docs test

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/mypy

# The pages of docs/ as a site in build/site; a broken link is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

$(VENV)/.docs: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[docs]'
	touch $@

# The constraints file pins every version; torch first, since a plain `torch` may bring several GB of CUDA packages.
$(VENV)/.ready: constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or newer is needed, and this is " + sys.version'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache
