# `make demo` and `make test` set up everything they need in .venv; they require only Python 3.11+ (with venv) and GNU make 4.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST = $(BIN)/python -m pytest -q -m "not slow and not compose and not load and not stop" $(if $(CI),--durations=25)
RIVALS := tensorflow hivemind  # one benchmarks/requirements-NAME.txt each
PROTOS := $(wildcard proto/shardloss/v1/*.proto)
STUBS := client/src
# Two cores: each process computes with one thread.
export OMP_NUM_THREADS := 1

.PHONY: help setup demo demo-full demo-ask bench bench-quick bench-setup bench-soak bench-profile bench-gpu test test-with-ray test-without-ray test-package test-load test-stop test-long test-compose fuzz check audit format lint types protos protos-check docs clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

setup: $(VENV)/.ready  ## Create .venv with both packages and every tool, at pinned versions

$(VENV)/.ready: constraints.txt requirements-dev.txt client/pyproject.toml server/pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --requirement requirements-dev.txt
	$(PIP) --no-build-isolation --editable client[cli] --editable server
	touch $@

demo: setup  ## Train the city finder through the service (about 5 minutes) and ask it misspelt names
	$(BIN)/python -m examples.cities train

demo-full: setup  ## Like demo, but evaluate on every held-out name
	$(BIN)/python -m examples.cities train --full

demo-ask: setup  ## Ask the trained city finder: make demo-ask NAME="Koeln"
	$(BIN)/python -m examples.cities ask "$(NAME)"

bench: setup  ## Measure the service against its rivals (an hour or more); writes benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks run

bench-quick: setup  ## The same with small shapes and few steps (3 minutes); writes build/bench-quick/RESULTS.md
	$(BIN)/python -m benchmarks run --quick

bench-soak: setup  ## 10,000 steps: resident memory and /dev/shm must not grow; writes benchmarks/soak.json
	$(BIN)/python -m benchmarks soak --steps 10000

bench-profile: setup  ## Measure where the time of one step goes; writes docs/performance.png and build/profile.json
	$(BIN)/python -m benchmarks profile

bench-gpu: setup  ## The shard kernels on a CUDA GPU against local losses there; writes benchmarks/RESULTS-gpu.md
	$(BIN)/python -m benchmarks gpu

bench-setup: setup $(RIVALS:%=.venv-%/.ready)  ## Create the environments of rivals that cannot share .venv

.venv-%/.ready: benchmarks/requirements-%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	touch $@

.venv-audit/.ready: tools/requirements-audit.txt
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	touch $@

audit: .venv-audit/.ready  ## Audit every pinned dependency against an advisory service; reports a skip if none answers
	.venv-audit/bin/python tools/audit.py $(if $(OSV_URL),--service $(OSV_URL))

test: setup  ## The tests, in two sessions side by side: one uses Ray, the other does not (3 minutes on 2 cores)
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-with-ray test-without-ray

test-with-ray: setup
	$(PYTEST) tests/conformance tests/golden tests/system

test-without-ray: setup
	$(PYTEST) tests/architecture tests/hostile tests/statistical tests/unit

test-package: setup  ## The tests of one package in less than a minute: make test-package PACKAGE=shard
	$(BIN)/python -m tests.packages "$(PACKAGE)"

test-load: setup  ## Overload, silent calls, idle connections and abandoned sessions, measured on this machine (6 minutes)
	$(BIN)/python -m pytest -q -s -m load tests/load

test-stop: setup  ## SIGTERM with long calls inside, 20 times on Ray and on threads, and each process killed (15 minutes)
	$(BIN)/python -m pytest -q -s -m stop tests/stop

test-long: setup  ## Every case of every grid, statistics with fresh seeds, whole processes, several nodes (root)
	SHARDLOSS_TEST_EVERYTHING=1 SHARDLOSS_TEST_SEED=$(shell date +%s) \
		$(BIN)/python -m pytest -q --timeout 1800 -m "not compose and not load and not stop"

.venv-compose/.ready: tools/requirements-compose.txt
	$(PYTHON) -m venv .venv-compose
	.venv-compose/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	touch $@

test-compose: setup .venv-compose/.ready  ## The compose file on a container engine, by Compose 1 and 2, with Prometheus (20 minutes)
	$(BIN)/python -m pytest -q -s -m compose tests/compose

fuzz: setup  ## Ten minutes of spoilt requests and noise, from a new seed each time; make test sends 4,000 calls
	SHARDLOSS_FUZZ_S=600 SHARDLOSS_FUZZ_SEED=$(shell date +%s) $(BIN)/python -m pytest -q -s --timeout 900 tests/hostile/test_fuzz.py

check: format lint types protos-check test  ## What CI runs

format: setup
	$(BIN)/ruff format --check .

lint: setup
	$(BIN)/ruff check .
	$(BIN)/hadolint deploy/docker/Dockerfile

types: setup
	$(BIN)/mypy
	$(BIN)/mypy --strict examples/train.py tests/unit/client/typed.py

protos: setup  ## Regenerate the stubs in client/src/shardloss/v1
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=$(STUBS) --pyi_out=$(STUBS) $(PROTOS)
	$(BIN)/python -m grpc_tools.protoc -I proto --grpc_python_out=$(STUBS) $(shell grep -l '^service' $(PROTOS))

protos-check: setup  ## Fail if the stubs differ from what the contract generates
	rm -rf build/protos && mkdir -p build/protos
	$(MAKE) --no-print-directory protos STUBS=build/protos
	diff -r --exclude=__init__.py --exclude=__pycache__ build/protos/shardloss/v1 client/src/shardloss/v1

docs: setup  ## Write the generated pages of docs/
	$(BIN)/shardloss-server config page > docs/configuration.md
	$(BIN)/shardloss-server metrics page > docs/metrics.md

clean:  ## Remove everything that make created
	rm -rf $(VENV) $(RIVALS:%=.venv-%) .venv-audit .venv-compose build
