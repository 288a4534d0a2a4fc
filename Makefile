# Two commands do everything on a fresh machine with Python 3.11 and a C++ compiler: make demo, make test.
PYTHON ?= python3.11
SEED ?= 0
BIN := .venv/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: install demo demo-tiny lint test test-all stage-lock clean

install: .venv/.installed

# torch first: a range that another package asks for must find exactly this version in place. Last without setuptools' warnings,
# which tell a newcomer of its own experimental sections.
.venv/.installed: pyproject.toml constraints.txt components/fusion/kernels.c
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -e '.[dev]' -c constraints.txt
	touch $@

demo: install
	$(BIN)/realign testbed build runs/demo/testbed --seed $(SEED)
	$(BIN)/realign run runs/demo/testbed/realign.yaml --workspace runs/demo

demo-tiny: install
	$(BIN)/realign testbed build runs/demo-tiny/testbed --seed $(SEED) --size tiny
	$(BIN)/realign run runs/demo-tiny/testbed/realign.yaml --workspace runs/demo-tiny

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(PYTEST) -n 2 --dist loadgroup -m "not slow and not gpu"

test-all: lint
	$(PYTEST) -n 2 --dist loadgroup -m "not gpu"

# After a stage's code changed: see CONTRIBUTING.md. The first release takes --unreleased away.
stage-lock: install
	$(BIN)/python -m tests.stage_lock --unreleased

clean:
	rm -rf .venv runs build *.egg-info
