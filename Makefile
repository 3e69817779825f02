# Every target sets itself up: all it needs is make and Python 3.11 or newer. `make help` lists them.
# Another Python gets an environment of its own: `make test PYTHON=python3.12`.

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV := .venv-$(VERSION)
PARITY := .venv-parity-$(VERSION)
NOTEBOOKS := .venv-notebooks-$(VERSION)
# Tests run on this many processes. More than 4 costs more memory than it saves time.
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ $$n -lt 4 ] && echo $$n || echo 4)

.PHONY: demo test check lint fast notebooks parity exhaustive torture bench clean help python
.DELETE_ON_ERROR:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed  ## train, quantise and sample a tiny model on the embedded data, and print one table
	$(VENV)/bin/python -m launch.demo

test: $(VENV)/.installed-dev  ## all tests
	$(VENV)/bin/python -m pytest tests -n $(JOBS) --dist worksteal

check: lint fast  ## format, lint, types and the fast tests: what to run before a commit

lint: $(VENV)/.installed-dev  ## format, lint and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

fast: $(VENV)/.installed-dev  ## the fast tests
	$(VENV)/bin/python -m pytest tests -n $(JOBS) --dist worksteal -m 'not slow'

notebooks: $(NOTEBOOKS)/.installed  ## run the notebooks on a tiny model; pages in runs/notebooks
	$(NOTEBOOKS)/bin/python notebooks/run.py

parity: $(PARITY)/.installed  ## compare live with transformers and torch
	$(PARITY)/bin/python tests/golden/generate.py --check
	$(PARITY)/bin/python -m pytest tests -m parity

exhaustive: $(VENV)/.installed-dev  ## the combinations that `make test` leaves out
	$(VENV)/bin/python -m pytest tests -n $(JOBS) --dist worksteal --exhaustive -m exhaustive

torture: $(VENV)/.installed-dev  ## kills, notices, changed bits and broken files for two hours; see RELIABILITY.md
	$(VENV)/bin/python -m tests.torture
	$(VENV)/bin/python -m tests.fuzz

bench: $(VENV)/.installed  ## measure speed and memory on this machine
	$(VENV)/bin/python -m benchmarks

clean:  ## remove environments and caches; what runs wrote stays
	rm -rf .venv-* .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "make: PYTHON=$(PYTHON) is missing or older than 3.11; name a newer one, for example: make test PYTHON=python3.12" >&2; exit 1; }

$(VENV)/bin/python $(PARITY)/bin/python $(NOTEBOOKS)/bin/python: | python
	@$(PYTHON) -m venv $(@D)/.. || { \
	  rm -rf $(@D)/..; echo "make: $(PYTHON) cannot create environments; on Debian and Ubuntu install python3-venv" >&2; exit 1; }

# The extras come in one call of pip each, and a stamp that setup.py outdates makes it happen once.
$(VENV)/.installed: setup.py | $(VENV)/bin/python
	@echo "Installing gemma4_jax with Python $(VERSION) into $(VENV) (once, about a minute)"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-dev: setup.py | $(VENV)/bin/python
	@echo "Installing gemma4_jax and its development tools with Python $(VERSION) into $(VENV) (once, about a minute)"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $(VENV)/.installed $@

$(PARITY)/.installed: setup.py | $(PARITY)/bin/python
	@echo "Installing gemma4_jax, torch and transformers with Python $(VERSION) into $(PARITY) (once, some minutes)"
	@$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev,parity]'
	@touch $@

$(NOTEBOOKS)/.installed: setup.py | $(NOTEBOOKS)/bin/python
	@echo "Installing gemma4_jax and what notebooks need with Python $(VERSION) into $(NOTEBOOKS) (once, about a minute)"
	@$(NOTEBOOKS)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[notebooks,media]'
	@touch $@
