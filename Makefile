# `make run` runs Upkeep for this machine, `make test` tests it; neither needs a step before it.
# Everything lands in .venv, .run and the cache folder ($UPKEEP_CACHE, else ~/.cache/upkeep).

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Test files that run side by side; 0 runs them one after another, which reads best while mending.
JOBS ?= 2
READY := $(VENV)/.ready-$(shell cat requirements-dev.txt pyproject.toml | cksum | cut -d' ' -f1)

.PHONY: help run test demo check soak bench cluster cluster-down format lock clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): requirements-dev.txt pyproject.toml
	@$(PYTHON) deploy/local/venv.py $(VENV)
	@touch $@

run: $(READY) ## exporter, remediator, Prometheus and Alertmanager for this machine (dry run; ENFORCE=1 acts)
	@$(PY) -m deploy.local.run

demo: $(READY) ## break real things in a throwaway setting and watch them heal
	@$(PY) -m deploy.local.demo

test: $(READY) ## every test; long suites are sampled with a printed seed
	@$(PY) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

soak: $(READY) ## the same, long suites in full (hours)
	@UPKEEP_SOAK=1 $(PY) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

check: $(READY) ## format, lint, types, import contract, alert rules and route
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m mypy
	@$(VENV)/bin/lint-imports
	@$(PY) -m deploy.local.check_alerts

cluster: $(READY) ## a real one-node kubeadm cluster; prints KUBECONFIG=...
	@$(PY) -m tests.cluster up

cluster-down: $(READY) ## take that cluster away without trace
	@$(PY) -m tests.cluster down

bench: $(READY) ## the measured ratios of benchmarks/
	@for b in benchmarks/[a-z]*.py; do echo "== $$b"; $(PY) -m benchmarks.$$(basename $$b .py) || exit 1; done

format: $(READY) ## format and mend what can be mended by itself
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

lock: $(READY) ## renew the pinned, hashed dependencies
	@$(PY) -m pip install -q uv
	@$(PY) -m uv pip compile -q -U --no-annotate --no-header --generate-hashes --universal --python-version 3.11 pyproject.toml -o requirements.txt
	@$(PY) -m uv pip compile -q --no-annotate --no-header --generate-hashes --universal --python-version 3.11 --extra dev -c requirements.txt pyproject.toml -o requirements-dev.txt

clean: ## remove .venv and .run; the cache stays
	rm -rf $(VENV) .run
