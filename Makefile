# Two commands: `make demo` and `make test`. Both install into .venv first, and again when pyproject.toml changes.
PYTHON ?= python3
VENV   ?= .venv
RUNS   ?= runs
ARGS   ?=
BIN    := $(VENV)/bin
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no -m
SUM    := $(shell cksum pyproject.toml | cut -d' ' -f1)
READY  := $(VENV)/.demo-$(SUM)
TESTS  := $(VENV)/.dev-$(SUM)

.PHONY: demo test slow check help

help:
	@echo "make demo   install, train on digits, generate, evaluate (about 5 minutes on two cores)"
	@echo "make test   install, ruff, mypy, pytest"
	@echo "make slow   the measurements that take longer"

demo: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pipelines.demo runs=$(RUNS) $(ARGS)

test: $(TESTS) check
	$(BIN)/python -m pytest $(ARGS)

check: $(TESTS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: $(TESTS)
	$(BIN)/python -m pytest -m slow $(ARGS)

# A stamp is made only after everything before it succeeded, so a half-failed install is repaired by the next call.
$(READY): pyproject.toml
	$(call install,digits)

$(TESTS): pyproject.toml
	$(call install,dev)

define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Smalti needs Python 3.10 or newer")'
	@rm -f $(VENV)/.demo-* $(VENV)/.dev-*
	@test -x $(BIN)/python || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$(1)]"
	@touch $@
endef
