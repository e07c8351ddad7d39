# `make help` lists what there is.
SHELL := /bin/bash
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: help setup setup-test run test quick lint matrix soak bench bench-policy bench-foresight rehearsal deb release clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

setup: ## prepare .venv with what the service needs
	@tools/setup run

setup-test:
	@tools/setup test

run: setup ## the service in the foreground, with a configuration that merges (Ctrl-C puts all back)
	@exec tools/run $(ARGS)

# Both: what the tests of `make run` would install must not come while guests read .venv.
test: setup setup-test ## everything that must hold: unit, live KSM, guests
	@tools/test $(ARGS)

quick: setup-test ## only what needs no root and no guest
	$(PYTEST) -m "not ksm and not guest and not system and not image" $(ARGS)

lint: setup-test ## style, types, import rules, documents
	$(PYTEST) tests/lint $(ARGS)

matrix: setup-test ## all scenarios on every kernel, in guests
	$(BIN)/python -m tests.matrix $(ARGS)

soak: setup-test ## load, fuzzing, kill -9, repetitions: hours
	KSMD_CTL_SOAK=1 $(PYTEST) -m soak $(ARGS)

bench: setup-test ## figures of speed, as ratios against peers in the same run
	$(BIN)/python -m benchmarks $(ARGS)

bench-policy: setup-test ## policies beside each other on real page contents, root: eleven minutes (ARGS="--seeds 1,2 --memory qemu,small")
	$(BIN)/python -m benchmarks.policy $(ARGS)

bench-foresight: setup-test ## estimates beside what ksmd then reaches, on real page contents, root: ten minutes (ARGS="--cases 5", "--guests")
	$(BIN)/python -m benchmarks.foresight $(ARGS)

rehearsal: setup-test ## a fleet without a cluster: 200 services, one Prometheus, rules and dashboards: twelve minutes (ARGS="--hosts 50 --seconds 60")
	$(BIN)/python -m benchmarks.fleet $(ARGS)

deb: ## the Debian package, in dist/
	@packaging/build-deb dist

image: ## the OCI image, in dist/ (root, buildah, mmdebstrap, a Debian archive): docs/container.md
	@packaging/image/build $(ARGS) dist

release: ## check version and changelogs, then build package and source archive into dist/
	@tools/release $(ARGS)

clean: ## remove what was built here
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
