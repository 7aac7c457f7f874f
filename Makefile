# make demo: the main job on real digits. make test: lint, types, tests. Both start from a fresh machine.
.PHONY: demo test test-slow lint docs bench clean

PYTHON ?= $(shell for p in python3.11 python3; do $$p -c "" 2> /dev/null && echo $$p && break; done)
BIN := .venv/bin
DEV := .venv/installed-dev
DOCS := .venv/installed-docs
BENCH := .venv/installed-bench

ifeq ($(origin PYRO_AEVB_DATA),undefined)
ifneq ($(wildcard ../shared/data),)
export PYRO_AEVB_DATA := $(abspath ../shared/data)
endif
endif

demo: $(DEV)
	$(BIN)/python -m pyro_aevb demo --data digits --out report

# One thread a process: two test processes share the machine, and one seed gives one result.
test test-slow: export OMP_NUM_THREADS := 1
test test-slow: export MKL_NUM_THREADS := 1

test: lint
	$(BIN)/pytest -n 2 -m "not slow"

test-slow: $(DEV)
	$(BIN)/pytest -n 2 -m slow

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy pyro_aevb

docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(BENCH)
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf .venv report site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(DEV): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit('Python 3.11 or newer is needed' if sys.version_info < (3, 11) else 0)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]" --constraint constraints.txt
	touch $@

$(DOCS): $(DEV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev,docs]" --constraint constraints.txt
	touch $@

$(BENCH): $(DEV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev,bench]" --constraint constraints.txt
	touch $@
