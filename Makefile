# Everything a fresh machine needs: Python 3.11, pip, make, git.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
SEED ?= 0
WORKDIR := $(DEMO)/workdir-$(SEED)

export JAX_PLATFORMS ?= cpu

.PHONY: demo test test-slow lint clean

demo: $(VENV)/.runtime
	$(BIN)/python -m segdiff_jax.train --config configs/demo.py --workdir $(WORKDIR) \
	  --config.seed=$(SEED)
	$(BIN)/python -m segdiff_jax.data.scenes --output $(DEMO)/photos --count 6
	$(BIN)/python -m segdiff_jax.predict --checkpoint $(WORKDIR) --images $(DEMO)/photos/images \
	  --classes @$(DEMO)/photos/classes.txt --output $(DEMO)/predictions --ensemble 4
	$(BIN)/python -m segdiff_jax.evaluate --config configs/demo.py --checkpoint $(WORKDIR) \
	  --output $(DEMO) --config.seed=$(SEED)

# Two processes, a file at a time: most of a test is tracing and compiling, which uses one core.
test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# requirements.txt pins the whole environment of the runtime; the test extra pins its own.
$(VENV)/.runtime: requirements.txt pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --requirement requirements.txt
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

$(VENV)/.test: $(VENV)/.runtime
	$(BIN)/pip install --quiet --constraint requirements.txt --editable '.[test]'
	touch $@
