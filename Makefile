# Every target sets up what it needs: `make train` works in a fresh clone.
#
# TORCH replaces the torch that constraints.txt pins, for a CUDA build or another version:
#     make train TORCH="torch==2.13.0+cu130"
# (pip's own PIP_EXTRA_INDEX_URL says where to find such a build; `export TORCH=...` holds for every target.)
# PYTHON is the interpreter that makes the virtual environment: 3.11 or newer.

TORCH ?=
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The stamp's name holds the choice of torch, so that another choice installs again.
STAMP := $(VENV)/.installed-$(shell printf '%s' '$(TORCH)' | cksum | cut -d' ' -f1)

.PHONY: docs coverage bench-pages test-wheel bench-start torture torture-files bench-saving train test check bench bench-search bench-partition bench-build bench-record bench-plan bench-predict bench-hand-made bench-links bench-runtime bench-hosts bench-steady bench-levers bench-gpu bench-mesh setup clean
.DELETE_ON_ERROR:

train: setup
	$(BIN)/evenflow train examples/train_gpt.toml

# Tests start a hundred processes of Python: each would compile all anew where it may write no byte-code. They wait for
# them a third of the time: three workers for two cores.
WORKERS = $(shell expr $$(getconf _NPROCESSORS_ONLN) \* 3 / 2)
test: export PYTHONDONTWRITEBYTECODE :=
test: setup
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

# How much of the core that needs no torch (pyproject.toml names it) its own tests run, branches included. What numba
# compiled cannot be counted, so the kernels' tests run as Python first.
KERNELS := $(filter-out %/test_find.py,$(wildcard tests/search/test_*.py))
CORE := $(addprefix src/evenflow/,ir cluster bounds search schedules plan view journal) \
	$(filter-out %/__main__.py %/launcher.py,$(wildcard src/evenflow/*.py)) \
	$(addprefix tests/,ir cluster schedules search/test_find.py plan view journal) \
	$(patsubst %,tests/test_%.py,bill bounds bounds_of cost_table critical_path foreign lower memory plain_data rules \
	schedule_file simulate soundness torch_schedule transfers validate)
coverage: setup
	NUMBA_DISABLE_JIT=1 $(BIN)/python -m pytest --numprocesses auto -W "ignore:overflow encountered" --cov --cov-report= $(KERNELS)
	$(BIN)/python -m pytest --numprocesses auto --cov --cov-append --cov-fail-under=95 --cov-report=term-missing:skip-covered $(CORE)

# 20,000 damaged plans and schedules, always the same ones, where `make test` takes a thousand: ten minutes.
torture-files: setup
	EVENFLOW_NUM_FILES=20000 $(BIN)/python -m pytest --timeout=0 tests/test_hostile_files.py

# The wheel in clean environments, one without torch: a minute, and the network.
test-wheel: setup
	$(BIN)/python -m pytest tests/wheel_install.py

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The pages of docs/ as a site: build/site/index.html. A warning is an error; nothing comes from the network.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: bench-start bench-search bench-partition bench-build bench-record bench-plan bench-predict bench-hand-made bench-links bench-runtime bench-hosts bench-steady bench-levers bench-mesh bench-saving bench-pages

bench-start: setup
	$(BIN)/python benchmarks/start_up.py

bench-search: setup
	$(BIN)/python benchmarks/simulate.py
	$(BIN)/python benchmarks/search_equal.py
	$(BIN)/python benchmarks/search_unequal.py

bench-partition: setup
	$(BIN)/python benchmarks/partition.py

bench-plan: setup
	$(BIN)/python benchmarks/plan_big.py

bench-predict: setup
	$(BIN)/python benchmarks/predict.py

bench-links: setup
	$(BIN)/python benchmarks/links.py

bench-runtime: setup
	$(BIN)/python benchmarks/runtime.py

bench-hosts: setup
	$(BIN)/python benchmarks/hosts.py

# A hundred ranks killed; twenty minutes and more.
torture: setup
	$(BIN)/python benchmarks/torture.py 100

bench-saving: setup
	$(BIN)/python benchmarks/saving.py

# In Chromium, which is to be installed; `python benchmarks/pages.py docs/` draws the pictures of the docs.
bench-pages: setup
	$(BIN)/python benchmarks/pages.py

bench-steady: setup
	$(BIN)/python benchmarks/steady.py

bench-mesh: setup
	$(BIN)/python benchmarks/mesh.py

bench-gpu: setup
	$(BIN)/python benchmarks/gpu.py

bench-hand-made: setup
	$(BIN)/python benchmarks/hand_made.py

bench-record: setup
	$(BIN)/python benchmarks/record.py
	$(BIN)/python benchmarks/replay.py

bench-levers: setup
	$(BIN)/python benchmarks/levers.py

bench-build: setup
	$(BIN)/python benchmarks/build_memory.py

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH),{ grep -v '^torch==' constraints.txt; echo '$(TORCH)'; },cat constraints.txt) > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint $(VENV)/constraints.txt
	rm -f $(VENV)/.installed-*
	touch $@

clean:
	rm -rf $(VENV) .coverage dist build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
