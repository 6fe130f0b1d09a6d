# The Python that makes .venv; everything else runs inside it. UV=1 installs with uv, which is faster and not needed.
PYTHON ?= python3
UV ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Into the virtual environment of the target.
PIP_INSTALL = $(if $(UV),uv pip install --python $(@D)/bin/python,$(@D)/bin/python -m pip install --disable-pip-version-check)

# Nothing here needs the Hub: what would reach for it fails at once instead.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

# Two workers of one thread each; a file stays with one worker, which keeps what its tests share.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: help install demo test test-all test-versions test-oldest test-newest lint docs dist clean
.DEFAULT_GOAL := help

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(STAMP)  ## Make .venv with the tested versions (again only when they change)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -c constraints.txt torch==2.13.0
	$(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: install  ## The whole story on a model and data made on the spot, offline
	$(BIN)/accelerate launch --cpu --num_processes 1 --num_machines 1 --num_cpu_threads_per_process 2 \
		--mixed_precision no --dynamo_backend no \
		recipes/in2core.py --config recipes/quickstart/in2core.yaml

test: install  ## Fast tests
	$(PYTEST)

test-all: install  ## Every test, the slow ones too
	$(PYTEST) -m "slow or not slow"

test-versions: test-oldest test-newest  ## Fast tests on the oldest and the newest TRL, transformers and datasets

test-oldest test-newest: BIN = .venv-$(@:test-%=%)/bin
test-oldest test-newest: test-%: .venv-%/.installed
	$(PYTEST)

# The few pins of constraints-oldest.txt or constraints-newest.txt take the place of those in constraints.txt.
.venv-%/.installed: pyproject.toml constraints.txt constraints-%.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	awk -F == 'NR == FNR { pinned[$$1] } NR == FNR || !($$1 in pinned)' constraints-$*.txt constraints.txt > $(@D)/constraints.txt
	$(PIP_INSTALL) -c $(@D)/constraints.txt torch==2.13.0
	$(PIP_INSTALL) -c $(@D)/constraints.txt -e '.[dev]'
	touch $@

lint: install  ## ruff (rules and format) and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Each in an environment of its own, without torch: the site reads docstrings from the sources.
docs: .venv-docs/.installed  ## The site with its API reference, into build/site; a broken link is an error
	.venv-docs/bin/python -m mkdocs build --strict

dist: .venv-dist/.installed  ## What a release uploads, into dist/, checked as the package index checks it
	rm -rf dist
	.venv-dist/bin/python -m build --no-isolation
	.venv-dist/bin/python -m twine check --strict dist/*

.venv-docs/.installed .venv-dist/.installed: .venv-%/.installed: pyproject.toml constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["$*"], sep="\n")' \
		> $(@D)/requirements.txt
	$(PIP_INSTALL) -c constraints.txt -r $(@D)/requirements.txt
	touch $@

clean:  ## Remove what was built, run and cached; .venv stays
	rm -rf build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find hf_in2core recipes tests -name __pycache__ -type d -prune -exec rm -rf {} +
