# Every target does the set-up that it needs. PYTHON is any Python 3.11 or later.
PYTHON ?= python3.11
VENV := .venv
READY := $(VENV)/.ready
RUN := $(VENV)/bin/python

.PHONY: demo test test-all benchmark lint types install clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned packages into $(VENV) (once, a minute or two) ..."
	@$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	@touch $@

demo: $(READY)
	@$(RUN) deployments/quickstart/demo.py

test: $(READY)
	$(RUN) -m pytest

test-all: $(READY)
	$(RUN) -m pytest -m "not gpu"

benchmark: $(READY)
	$(RUN) tests/benchmarks/benchmark_engines.py

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# Mypy does not follow the package map of pyproject.toml, so it gets the folders under their installed names.
types: $(READY)
	@mkdir -p build/types/prefect_huggingface
	@for folder in blocks tasks flows deployments; do ln -sfn ../../../$$folder build/types/prefect_huggingface/$$folder; done
	MYPYPATH=build/types $(RUN) -m mypy -p prefect_huggingface

clean:
	rm -rf $(VENV) .quickstart build *.egg-info
