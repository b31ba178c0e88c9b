# Every target works from a clean clone; the ones that need the environment prepare it first. `make` alone lists them.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help setup model demo up down test test-gpu sim fault soak lint protos lock image bench load

PYTHON ?= python3
MODEL ?=
NODES ?= 2
WORKERS ?= 1
TESTS ?=
N ?= 1000
SEED ?= 1
JOBS ?= 0
REPS ?= 20
IMAGE ?= concertina:dev
MINUTES ?= 10

BIN := .venv/bin
PROTOS := protos/concertina/kvstore/v1/kvstore.proto protos/concertina/inference/v1/inference.proto
SETUP_FILES := pyproject.toml constraints.txt deploy/setup/install_torch.py
# A new name when the lock or the place of this folder changes, so that the environment is brought up to date then, and only then.
STAMP := .venv/.setup-$(shell { cat $(SETUP_FILES); echo "$(CURDIR)"; } | cksum | cut -d ' ' -f 1)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  Variables: PYTHON=$(PYTHON) (3.11 or newer), MODEL=DIR or hub name, NODES=$(NODES), WORKERS=$(WORKERS), TESTS=paths for make test, N=$(N), SEED=$(SEED), REPS=$(REPS), IMAGE=$(IMAGE), MINUTES=$(MINUTES) for make load and make soak"

setup: $(STAMP) model ## make .venv from the lock and fetch the default model (once; then it takes a moment)

model: $(STAMP)
	@$(BIN)/python -m services.model > /dev/null

# --no-compile: Python compiles what is really imported, a small part of what pip would.
$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "setup: $(PYTHON) is missing or older than Python 3.11; run: make setup PYTHON=python3.11"; exit 1; }
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv --clear .venv || \
		{ echo "setup: $(PYTHON) -m venv failed; on Debian and Ubuntu it is in the package python3-venv"; exit 1; }
	$(BIN)/python deploy/setup/install_torch.py constraints.txt
	$(BIN)/python -m pip install --no-compile -c constraints.txt hatchling editables
	$(BIN)/python -m pip install --no-compile -c constraints.txt --no-build-isolation -e '.[dev]'
	@rm -f .venv/.setup-* && touch $@

demo: setup ## the main job on this machine: cold, warm, second worker, eviction, a killed node; at most a few minutes
	$(BIN)/concertina demo

up: setup ## start Valkey, NODES store nodes and WORKERS workers with MODEL; prints how to call them
	$(BIN)/concertina up --nodes $(NODES) --workers $(WORKERS) $(if $(MODEL),--model "$(MODEL)")

down: ## end what `make up` started
	@if [ -x $(BIN)/concertina ]; then $(BIN)/concertina down; else echo "nothing was started from here: there is no .venv"; fi

test: setup ## all tests that need no GPU
	$(BIN)/python -m pytest -q -m "not gpu" $(TESTS)

test-gpu: setup ## the tests that need a CUDA device; each is skipped, saying so, where there is none
	$(BIN)/python -m pytest -q -rs -m gpu tests/gpu

sim: setup ## simulate N clusters on virtual time, seeds SEED and up, on JOBS cores (0: all); what fails is replayed by `make test` for ever
	$(BIN)/python -m tests.sim --n $(N) --seed $(SEED) --jobs $(JOBS)

load: setup ## a system under twice the load that it can take, for MINUTES
	$(BIN)/concertina bench serving --load $(MINUTES)

bench: setup ## all benchmarks: results to tests/bench, the README's plots from them to deploy/docs; tens of minutes
	$(BIN)/concertina bench all --out tests/bench --plots deploy/docs

fault: setup ## make each fault of tests/fault REPS times on real processes, and judge every byte, deadline and pin
	$(BIN)/python -m tests.fault --reps $(REPS)

soak: setup ## nodes under load and random kills for MINUTES; nothing may be left behind at any idle moment
	$(BIN)/python -m tests.fault.soak --minutes $(MINUTES)

lint: setup ## ruff, import layers, buf, sizes of files and functions, generated protos up to date
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo
	cd protos && ../$(BIN)/buf lint
	$(BIN)/python -m pytest -q tests/contract/test_repository.py

protos: setup ## regenerate the gRPC code beside the .proto files
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS)

lock: setup ## write what is installed now to constraints.txt
	{ head -n 1 constraints.txt; { $(BIN)/python -m pip freeze --exclude-editable; grep '^uv==' constraints.txt; } \
		| sed 's/+cpu$$//' | sort -fu; } > .venv/lock && cp .venv/lock constraints.txt

image: ## build the container image IMAGE
	docker build -f deploy/docker/Dockerfile -t $(IMAGE) .
