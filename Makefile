# `make demo` and `make test` do all their own set-up: a virtual environment, and everything in it.
PYTHON ?= python3
VENV   ?= .venv
# `EXTRAS=test` leaves out torch and transformers (large); the tests against them are then skipped.
EXTRAS ?= test,transformers
# Tests differ in length by a hundred times: idle processes take over others' tests.
PARALLEL ?= -n auto --maxprocesses 8 --dist worksteal

, := ,
INSTALLED = $(VENV)/installed-$(subst $(,),-,$(EXTRAS))
DEMO = $(or $(wildcard $(INSTALLED)),$(VENV)/installed-for-demo)
BIN = $(VENV)/bin

.PHONY: demo test test-slow lint clean

demo: $(DEMO)
	@PATH="$(abspath $(BIN)):$$PATH" bash tools/demo.sh

test: $(INSTALLED) lint
	$(BIN)/pytest $(PARALLEL)

test-slow: $(INSTALLED)
	$(BIN)/pytest $(PARALLEL) -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

# The demo takes only llama.cpp to compare with, or what `make test` has installed already.
$(VENV)/installed-for-demo: NEEDS = test
$(INSTALLED): NEEDS = $(EXTRAS),dev

$(VENV)/installed-%: pyproject.toml $(wildcard setup.py) $(wildcard ops/cpu/*.cc ops/cpu/*.h)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(NEEDS)]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
