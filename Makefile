# The list of habits. `make demo` and `make test` set up what they need.
.DEFAULT_GOAL := help
SHELL := bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TEST := $(BIN)/python -m pytest -q --durations=8
# Two processes of one torch thread each; threads that wait must not spin on the other's core.
HALVES := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TORCHINDUCTOR_COMPILE_THREADS=1

# Faults of single processes, one thread each; the others want the machine for themselves.
PROCESS_FAULTS := tests/fault/test_exact_resume.py tests/fault/test_store_faults.py \
	tests/fault/test_durable_calls.py
# What the image runs in Python: each is a module of its own, most of them without a suffix.
PROGRAMS := everstep-healthy everstep-interface stop-empty requirements.py
CHAOS_ROUNDS ?= 10
FUZZ_ROUNDS ?= 10000

.PHONY: help setup demo test test-all chaos lint fmt type proto metrics-page bench e2e up down check clean

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: $(VENV)/.ready  ## a virtual environment with everything, pinned

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade -c constraints.txt pip
	$(BIN)/pip install --quiet -c constraints.txt --build-constraint constraints.txt -e '.[service,trainer,dev]'
	touch $@

demo: setup  ## train, stop, continue with other learning rates: the whole system in 4 minutes
	@$(BIN)/python -m examples.demo

# $(call layer,NAME,COMMAND): the command, and then how long it took.
layer = @began=$$(date +%s); $(2) && echo "layer $(1): $$(( $$(date +%s) - began )) s"

test: setup  ## unit, property, contract and architecture tests; no system package needed
	$(call layer,test,$(HALVES) $(TEST) -n 2 --dist worksteal tests/unit tests/property tests/contract tests/architecture)

test-all: test  ## and integration, fault and e2e tests: real Ray, SeaweedFS, Prometheus, Docker
	$(call layer,faults of processes,$(HALVES) $(TEST) -n 2 --dist worksteal $(PROCESS_FAULTS))
	$(call layer,integration and faults of the stack,$(TEST) tests/integration tests/fault/test_whole_stack.py)
	$(call layer,e2e,$(TEST) -s tests/e2e)

lint: setup  ## ruff, import rules, proto lint and breaking changes, Dockerfile, compose files
	$(call layer,lint,$(BIN)/ruff check . \
		&& $(BIN)/ruff format --check . \
		&& $(BIN)/lint-imports \
		&& $(BIN)/buf lint \
		&& $(BIN)/buf breaking --against proto/baseline.binpb \
		&& $(BIN)/hadolint Dockerfile \
		&& $(BIN)/shellcheck deploy/up deploy/bin/everstep-ray deploy/bin/everstep-service \
			deploy/bin/everstep-store deploy/bin/stop-last examples/buf-curl .ci/run \
		&& $(BIN)/check-jsonschema --builtin-schema vendor.compose-spec \
			docker-compose.yml deploy/worker.compose.yml)

fmt: setup  ## format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: setup  ## mypy --strict
	$(call layer,type,$(BIN)/mypy \
		&& for each in $(PROGRAMS); do $(BIN)/mypy deploy/bin/$$each || exit; done)

proto: setup  ## generate the stubs
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=. --pyi_out=. --grpc_python_out=. \
		proto/everstep/v1/everstep.proto

metrics-page: setup  ## docs/metrics.md, from the metrics that the service exports
	$(BIN)/python -m service.metrics_page docs/metrics.md

e2e: setup  ## the compose stack on a Docker engine: build, train, kill, stop, go on
	$(TEST) -s tests/e2e

up:  ## start the stack of docker-compose.yml; makes its secrets once
	@deploy/up

down:  ## stop it and remove its containers; volumes and secrets stay
	docker compose --profile '*' down

chaos: setup  ## kill trainers at many random steps, CHAOS_ROUNDS=10 of each case; 10,000 wrong calls
	EVERSTEP_FUZZ_ROUNDS=$(FUZZ_ROUNDS) $(HALVES) $(TEST) -n 2 --dist worksteal tests/property/test_fuzzing.py
	EVERSTEP_CHAOS_ROUNDS=$(CHAOS_ROUNDS) $(HALVES) $(TEST) -n 2 --dist worksteal tests/fault/test_exact_resume.py
	EVERSTEP_CHAOS_ROUNDS=$(CHAOS_ROUNDS) $(TEST) tests/fault/test_seeded_stack.py

bench: setup  ## the control plane with 100 and 10,000 jobs: latencies, watchers, reporters
	$(BIN)/python -m benchmarks.control_plane

check: lint type test-all  ## what CI runs

clean:  ## remove what was built
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
