# Needs python (>= 3.11) with venv, make and a package index; nothing else.
#
#   make quickstart   train, checkpoint, reshard and serve on a simulated mesh
#   make test         lint and the default tests, as .ci/run does; with an older
#                     Python, those of the GPU kernels too with a newer one
#   make test-slow    the tests marked slow
#   make lint         ruff only
#   make format       ruff, applied
#   make constraints  newest versions that install together, written to
#                     constraints/ for this Python; commit after `make test`
#   make clean        removes what the others made, runs/ excepted
#
# PYTHON=python3.12 chooses the interpreter, VENV=dir the environment,
# WORKERS=4 the number of test processes.

# An interpreter that is too old is passed over for a newer one.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	then echo $$p; exit; fi; done; echo python3)
VENV ?= .venv
WORKERS ?= 2

# Only JAX from 0.11 on, which needs Python 3.12, interprets GPU kernels.
# pyenv's Pythons need not be on the PATH.
NEWER ?= $(shell \
	for p in python3.12 $(HOME)/.pyenv/versions/3.12.*/bin/python; do \
	if $$p -c 'import venv, ensurepip' 2>/dev/null; then echo $$p; exit; fi; done)
NEWER_VENV ?= .venv-gpu

TAG := $(shell $(PYTHON) -c \
	'import sys; print("py%d%d" % sys.version_info[:2])' 2>/dev/null)
# A Python without a tested list of versions takes the newest list.
CONSTRAINTS := $(firstword $(wildcard constraints/$(TAG).txt) \
	$(lastword $(sort $(wildcard constraints/py*.txt))))
BIN := $(VENV)/bin
CREATED := $(VENV)/.created-$(TAG)
INPUTS := setup.py pyproject.toml $(CONSTRAINTS)
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

.PHONY: quickstart test test-gpu-kernels test-slow lint format constraints \
	clean help check-python
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   //p' Makefile

quickstart: $(VENV)/.installed
	$(BIN)/python -m experiments.quickstart

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
	@$(MAKE) --no-print-directory test-gpu-kernels

# Where the tests above could not: kernels are interpreted, not only lowered.
test-gpu-kernels: $(VENV)/.installed-test
	@if $(BIN)/python -c 'from pallas_kernels.common import hopper; \
	  raise SystemExit(not hopper.can_interpret())'; then \
	  echo "GPU kernels were interpreted in the tests above."; \
	elif [ -z "$(NEWER)" ]; then \
	  echo "No Python 3.12: GPU kernels are not interpreted."; \
	else $(MAKE) --no-print-directory $(NEWER_VENV)/.installed && \
	  $(NEWER_VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile \
	    tests/pallas_kernels/gpu tests/contracts/test_kernels.py \
	    -m 'not slow and not gpu' -k 'gpu and not tpu'; \
	fi

# What those tests import, and nothing more.
$(NEWER_VENV)/.installed: setup.py constraints/py312.txt
	$(NEWER) -m venv --clear $(NEWER_VENV)
	$(NEWER_VENV)/bin/python -m pip install --quiet --no-input \
	  --disable-pip-version-check --constraint constraints/py312.txt \
	  absl-py beartype hypothesis jax jaxtyping pytest pytest-xdist
	@touch $@

test-slow: $(VENV)/.installed-test
	@# 5 is pytest's word for: no test is marked so.
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m slow || [ $$? -eq 5 ]

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The environment is made anew when PYTHON is another version than it has.
$(CREATED): | check-python
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed: $(CREATED) $(INPUTS)
	$(PIP) install --quiet --constraint $(CONSTRAINTS) --editable .
	@touch $@

$(VENV)/.installed-test: $(CREATED) $(INPUTS)
	$(PIP) install --quiet --constraint $(CONSTRAINTS) --editable '.[test]'
	@$(BIN)/python -m pallas_kernels.gpu_compiler || \
	  echo "No GPU compiler: tests that need it are skipped."
	@touch $@ $(VENV)/.installed

check-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  2>/dev/null || { \
	  echo "OneMesh needs Python 3.11 or newer, but '$(PYTHON)' is" \
	    "$$($(PYTHON) --version 2>/dev/null || echo not there)."; \
	  echo "Install one, or name one: make PYTHON=/path/to/python3.12 ..."; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments: its venv or" \
	    "ensurepip module is missing."; \
	  echo "On Debian and Ubuntu: apt install python3-venv"; \
	  exit 1; }

constraints: | check-python
	$(PYTHON) -m venv --clear .cache/constraints
	.cache/constraints/bin/python -m pip install --quiet --editable '.[test]'
	.cache/constraints/bin/python -m pip freeze --exclude-editable \
	  >.cache/constraints/freeze.txt
	{ echo "# Tested together. Refresh: make constraints, then make test."; \
	  cat .cache/constraints/freeze.txt; } >constraints/$(TAG).txt
	rm -rf .cache/constraints

clean:
	rm -rf $(VENV) $(NEWER_VENV) .cache build dist *.egg-info
	rm -rf .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
