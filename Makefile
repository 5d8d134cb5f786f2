# `make` alone lists the targets.
VENV := .venv
PYTHON := $(VENV)/bin/python
# Written after a complete installation only, so that an interrupted one is taken up again. It holds what was installed,
# so that files which Git has touched and not changed install nothing.
INSTALLED := $(VENV)/.installed
CORPUS := data/shakespeare
RUN := runs/gla_tiny

# Importing JAX takes 2 s with bytecode and 6 s without, so it is kept, also where the environment says otherwise.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help train test bench notebooks

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

train: $(INSTALLED) $(CORPUS)/manifest.json ## train gla_tiny on Shakespeare, then evaluate it and write a sample (about 4 minutes on two cores)
	$(PYTHON) experiments/train.py --config=gla_tiny --workdir=$(RUN)
	$(PYTHON) experiments/evaluate.py --workdir=$(RUN)
	$(PYTHON) experiments/generate.py --workdir=$(RUN) --prompt="KING:" --tokens=400 --temperature=0.8 --seed=1 --out=$(RUN)/sample.txt
	@echo
	@echo "checkpoints:  $(RUN)/checkpoints"
	@echo "loss curve:   $(RUN)/loss.png"
	@echo "evaluation:   $(RUN)/evaluation_val_256.json"
	@echo "sample:       $(RUN)/sample.txt"

test: $(INSTALLED) ## run the CPU tests
	JAX_PLATFORMS=cpu XLA_FLAGS="$$($(PYTHON) -m tests.environment)" $(PYTHON) -m pytest -n 2 --dist=worksteal -m "not gpu"

bench: $(INSTALLED) ## time the kernels on this machine
	$(PYTHON) experiments/bench_kernels.py

notebooks: $(INSTALLED) ## write each notebook's .ipynb from its script, and run it
	$(PYTHON) -m jupytext --update --to ipynb experiments/notebooks/[0-9]*.py
	$(PYTHON) -m pytest tests/experiments/test_notebooks.py

$(CORPUS)/manifest.json: | $(INSTALLED)
	$(PYTHON) experiments/prepare_data.py --corpus=shakespeare --out=$(CORPUS)

# Version managers leave commands such as python3.12 on the path that only print an error, so each is tried by running it.
FIND_PYTHON = for python in python3.12 python3.13 python3.14 python3 python; do \
    "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && { command -v "$$python"; exit 0; }; \
  done; echo "Python 3.12 or newer is needed and none was found: install it from https://www.python.org/downloads/" >&2; exit 1

$(INSTALLED): requirements.txt pyproject.toml
	@test -x $(PYTHON) || { python="$$($(FIND_PYTHON))" && "$$python" -m venv $(VENV); }
	@cat $^ | cmp -s - $@ || { echo "installing into $(VENV)" && \
	  $(PYTHON) -m pip install --disable-pip-version-check --quiet --no-compile -r requirements.txt; }
	@cat $^ > $@
