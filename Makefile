# make demo: find and mask the neurons of a small model, and write a report.
# make test, make lint: what CI runs. All work in .venv, made when it is missing or out of date.

PYTHON    ?= python3
VENV      ?= .venv
PIP_FLAGS ?=
DEMO_OUT  ?= runs/demo
DEMO_ARGS ?=
WHEEL_DIR ?= dist
WORKERS   ?= auto
TEST_ARGS ?=

BIN := $(VENV)/bin
# As many processes as cores; each test runs on one thread. Without nbmake every process starts a second earlier.
PYTEST = $(BIN)/python -m pytest -p no:nbmake --numprocesses $(WORKERS) --dist worksteal --benchmark-disable
# Modules are compiled when they are first imported, not all at once.
PIP := $(BIN)/python -m pip install --quiet --no-compile $(PIP_FLAGS) --constraint constraints.txt

# The caller's PYTHONPATH must not hide what is installed here.
unexport PYTHONPATH
# Modules that every process compiles anew cost it many seconds.
unexport PYTHONDONTWRITEBYTECODE
# pyright otherwise asks the net whether there is a newer one.
export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1

.DEFAULT_GOAL := help
.PHONY: help demo install install-dev test test-all test-exhaustive test-fast test-shapes test-kernels test-true-size notebooks coverage benchmark lint format wheel clean distclean

help:
	@echo "make demo       find and mask the neurons of a small model; writes $(DEMO_OUT)"
	@echo "make test       the tests, in less than five minutes"
	@echo "make test-exhaustive  the longer ones that it leaves out"
	@echo "make test-all   every test: some take minutes each"
	@echo "make test-fast  the tests that take seconds each"
	@echo "make test-shapes   those again, types and tensor shapes checked at every call"
	@echo "make test-kernels  those again, as other processors and with two threads"
	@echo "make test-true-size  a random model of 14 GB through the stages: an hour, and as much disk"
	@echo "make notebooks  run every notebook but the one for a GPU, and see that none has outputs"
	@echo "make coverage   all tests, with the lines that none of them runs"
	@echo "make benchmark  speed against Hugging Face's model and the naive loop; prints ratios"
	@echo "make lint       ruff, pyright and the import layers"
	@echo "make format     let ruff rewrite what it can"
	@echo "make wheel      build $(WHEEL_DIR)/*.whl"
	@echo "make clean      remove what the tools left behind (make distclean: $(VENV) too)"

# Stamps: a second run installs nothing. The core goes in first, torch at the tested version.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) --editable '.[viz,notebook,dev]'
	@touch $@

install: $(VENV)/.core
install-dev: $(VENV)/.dev

demo: $(VENV)/.core
	$(BIN)/hones demo --out $(DEMO_OUT) $(DEMO_ARGS)
	@for page in $(DEMO_OUT)/*.html; do \
		test -f "$$page" || { echo "no report in $(DEMO_OUT)" >&2; exit 1; }; \
		echo "Report: $$page"; \
	done

test: $(VENV)/.dev
	$(PYTEST) -m "not exhaustive and not by_hand" --durations 15 $(TEST_ARGS)

# `make notebooks` runs that of the notebooks.
test-exhaustive: $(VENV)/.dev
	$(PYTEST) -m "exhaustive and not by_hand" --ignore tests/test_notebooks.py --durations 15 $(TEST_ARGS)

test-all: $(VENV)/.dev
	$(PYTEST) $(TEST_ARGS)

FAST = -m "not slow and not exhaustive and not by_hand"

test-true-size: $(VENV)/.dev
	HONES_TRUE_SIZE=1 $(BIN)/python -m pytest -p no:nbmake -m true_size -s $(TEST_ARGS)

test-fast: $(VENV)/.dev
	$(PYTEST) $(FAST) $(TEST_ARGS)

test-shapes: $(VENV)/.dev
	HONES_CHECK_SHAPES=1 $(PYTEST) $(FAST) $(TEST_ARGS)

# Other instruction sets, other matrix products (MKL's, which reads a variable of its own) and more threads add up
# in another order, and so round otherwise. What a test expects must not depend on it: all of them at once.
NUMBERS = tests/model tests/engine tests/analysis tests/hones tests/interventions tests/tasks tests/app/checks

test-kernels: $(VENV)/.dev
	ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE HONES_TEST_THREADS=2 OMP_WAIT_POLICY=passive \
		$(PYTEST) $(FAST) $(NUMBERS) $(TEST_ARGS)

# 08 is for a GPU; the test runs its code on the small models.
notebooks: $(VENV)/.dev
	$(BIN)/nbstripout --verify notebooks/*.ipynb
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbmake --nbmake-timeout 600 \
		--numprocesses $(WORKERS) -o testpaths= notebooks/0[1-7]*.ipynb $(TEST_ARGS)
	$(PYTEST) tests/test_notebooks.py $(TEST_ARGS)

coverage: $(VENV)/.dev
	$(BIN)/python -m pytest --cov $(TEST_ARGS)

benchmark: $(VENV)/.dev
	$(BIN)/python -m pytest tests/benchmarks/bench_*.py --confcutdir=tests/benchmarks --benchmark-disable-gc -q $(TEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-cache

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

wheel: $(VENV)/.dev
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $(WHEEL_DIR) .

clean:
	rm -rf build dist htmlcov .coverage .coverage.* .benchmarks .hypothesis
	rm -rf .import_linter_cache .pytest_cache .ruff_cache
	find hones_lens tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
