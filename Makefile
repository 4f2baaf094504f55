# Baton's commands. A fresh machine needs Python 3.11 and make; `make serve` and `make test` set up the rest in .venv.

MODEL ?= models/baton-tiny
PORT ?= 8000
PREFILL ?= 1
DECODE ?= 1
# The CUDA build comes by default from PyPI on Linux; the CPU build is smaller:
#   make serve TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
PYTHON ?= python3.11
ARGS ?=
MINUTES ?= 10
JOBS ?= logical

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help serve test lint types sizes architecture chart proto proto-check simulate clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

serve: $(VENV)/.serve ## serve MODEL on PORT with PREFILL and DECODE workers
	exec $(BIN)/baton serve $(MODEL) --port $(PORT) --prefill $(PREFILL) --decode $(DECODE) $(ARGS)

test: $(VENV)/.dev ## run the tests (ARGS="-k name" chooses)
	@$(call pytest,-n $(JOBS) --maxprocesses 8 --dist loadfile -m "not alone"); shared=$$?; \
	$(call pytest,-m alone); alone=$$?; \
	case "$$shared $$alone" in "0 0" | "0 5" | "5 0") ;; *) exit 1 ;; esac

lint: $(VENV)/.dev ## check style, and that nothing unsafe is imported
	$(BIN)/ruff check .

types: $(VENV)/.dev ## check the types of every package, strictly
	$(BIN)/mypy

sizes: $(VENV)/.dev ## print the size table; fail over a budget
	$(BIN)/python .ci/sizes.py

architecture: $(VENV)/.dev ## check that each package imports only what its floor may
	$(BIN)/python -m pytest -q --durations=0 tests/test_architecture.py

simulate: $(VENV)/.dev ## simulate faults for MINUTES on all cores (ARGS="--seeds 10000" counts instead)
	$(BIN)/python -m tests.simulation --minutes $(MINUTES) $(ARGS)

chart: ## copy alerts and dashboards into the Helm chart, which packs no file from outside
	rm -rf deploy/helm/baton/files/alerts deploy/helm/baton/files/dashboards
	mkdir -p deploy/helm/baton/files/alerts deploy/helm/baton/files/dashboards
	cp deploy/alerts/*.yaml deploy/helm/baton/files/alerts
	cp deploy/grafana/*.json deploy/helm/baton/files/dashboards

proto: $(VENV)/.dev ## generate wire/ from proto/wire/
	$(call generate,.)

proto-check: $(VENV)/.dev ## fail when wire/ is not what proto/wire/ generates
	rm -rf $(VENV)/proto && mkdir -p $(VENV)/proto
	$(call generate,$(VENV)/proto)
	diff -r -x __init__.py -x __pycache__ -x py.typed $(VENV)/proto/wire wire

clean: ## remove the environment and every cache
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# 5 is pytest's word for nothing chosen, as when ARGS names a test of the other half.
define pytest
	echo '$(BIN)/python -m pytest $(1) $(ARGS)'; $(BIN)/python -m pytest $(1) $(ARGS)
endef

define generate
$(BIN)/python -m grpc_tools.protoc -I proto \
	--plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	--python_out=$(1) --grpc_python_out=$(1) --mypy_out=$(1) --mypy_grpc_out=$(1) proto/wire/*.proto
endef

# Set-up: the stamps are older than pyproject.toml when it has changed. torch comes first and by itself, so that the
# build chosen above is the one that stays: a later install finds its requirement met.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	@touch $@

$(VENV)/.serve: pyproject.toml | $(VENV)/.torch
	$(PIP) install -e .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.torch
	$(PIP) install -e '.[dev]'
	@touch $@ $(VENV)/.serve
