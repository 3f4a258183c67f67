# Everything a clone needs. `make` lists the targets.

# The first Python that is new enough and can make virtual environments; override with PYTHON=...
CAN_SETUP := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	"$$p" -c '$(CAN_SETUP)' 2>/dev/null && echo "$$p" && break; done)
# More options for pip, for example another package index for a smaller or a CUDA-specific build of torch.
PIP_ARGS ?=
# A file or a folder of text for the quickstart; the Python standard library's sources if absent.
TEXT ?=

BIN := .venv/bin
STAMP := .venv/.megagpt-setup
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
# One thread a rank: several ranks share the cores. The hub is never asked: tests run without a network.
RUN := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline

# The tests are shared between so many processes; each has up to 8 ranks of its own.
TEST_WORKERS ?= 2
IN_PARALLEL := --numprocesses $(TEST_WORKERS) --dist worksteal

.PHONY: help setup quickstart quickstart-t5 test test-all test-gpu lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with the pinned requirements; a second run reuses it

# torch alone and first, so that no other package's range decides which build of it is taken.
$(STAMP): requirements.txt requirements-dev.txt setup.py pyproject.toml
	@test -n "$(PYTHON)" || { echo "make setup: found no Python 3.10 or newer with venv; name one with PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	@echo "Installing the pinned requirements into .venv (a few minutes the first time)"
	$(PIP_INSTALL) "$$(grep '^torch==' requirements.txt)"
	$(PIP_INSTALL) -r requirements-dev.txt
	$(PIP_INSTALL) --no-deps --editable .
	@touch $@

quickstart: $(STAMP) ## train a small GPT on 8 CPU ranks, start to end, in minutes; TEXT=path for your own text
	$(RUN) $(BIN)/python tools/quickstart.py $(if $(TEXT),--text "$(TEXT)")

quickstart-t5: $(STAMP) ## the same for an encoder and a decoder: span corruption, then summaries
	$(RUN) $(BIN)/python tools/quickstart_t5.py $(if $(TEXT),--text "$(TEXT)")

test: $(STAMP) ## run the test suite, in TEST_WORKERS=2 processes
	$(RUN) $(BIN)/python -m pytest $(IN_PARALLEL)

test-all: $(STAMP) ## the same, with all combinations of layouts, models and options
	$(RUN) MEGAGPT_EXHAUSTIVE=1 $(BIN)/python -m pytest $(IN_PARALLEL)

test-gpu: ## run the tests that need a GPU, with this machine's python (PYTHON=...), which has torch already
	$(RUN) $(PYTHON) -m pytest tests/gpu

lint: $(STAMP) ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove what builds and checks left; keeps .venv and runs/
	rm -rf build dist megagpt.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
