# Everything a fresh machine needs: Python 3.11 or newer, pip, make, git.
# The newest Python of those tested that runs; `make PYTHON=python3.11` chooses another.
PYTHON ?= $(firstword $(foreach v,3.13 3.12 3.11,$(shell python$(v) -c 'print("python$(v)")' 2>/dev/null)) python3)
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
SEED ?= 0
WORKDIR := $(DEMO)/workdir-$(SEED)

export JAX_PLATFORMS ?= cpu
# Compiled programs, kept from one command to the next and from one demo to the next.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache

.PHONY: demo smoke test test-slow lint bench clean

demo: $(VENV)/.runtime
	$(BIN)/python -m segdiff_jax.train --config configs/demo.py --workdir $(WORKDIR) \
	  --config.seed=$(SEED)
	$(BIN)/python -m segdiff_jax.data.scenes --output $(DEMO)/photos --count 6
	$(BIN)/python -m segdiff_jax.predict --checkpoint $(WORKDIR) --images $(DEMO)/photos/images \
	  --classes @$(DEMO)/photos/classes.txt --output $(DEMO)/predictions --ensemble 4
	$(BIN)/python -m segdiff_jax.evaluate --config configs/demo.py --checkpoint $(WORKDIR) \
	  --output $(DEMO) --config.seed=$(SEED)

# The demo's commands in a minute, on masks that mean nothing yet: for another Python or JAX.
SMOKE := runs/smoke
smoke: $(VENV)/.runtime
	rm -rf $(SMOKE)
	$(BIN)/python -m segdiff_jax.train --config configs/demo.py --workdir $(SMOKE)/workdir \
	  --config.train.steps=20 --config.vae.steps=20 --config.joint.steps=20 \
	  --config.data.scenes.train_examples=64
	$(BIN)/python -m segdiff_jax.data.scenes --output $(SMOKE)/photos --count 2
	$(BIN)/python -m segdiff_jax.predict --checkpoint $(SMOKE)/workdir \
	  --images $(SMOKE)/photos/images --classes "background; plain red ring" \
	  --output $(SMOKE)/predictions
	$(BIN)/python -m segdiff_jax.export --checkpoint $(SMOKE)/workdir --format diffusers \
	  --output $(SMOKE)/exported
	$(BIN)/python -m segdiff_jax.predict --checkpoint $(SMOKE)/exported \
	  --images $(SMOKE)/photos/images --classes "background; plain red ring" \
	  --output $(SMOKE)/predictions-of-export

# Two processes, a file at a time: most of a test is tracing and compiling, which uses one core.
# A process that dies ends the run: xdist would wait for ever for the one that takes its place.
test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What this machine can: the TPU compiler needs no TPU, but some 15 GB of memory and 10 minutes.
bench: $(VENV)/.test
	for suite in cpu predict input tpu; do \
	  $(BIN)/python -m segdiff_jax.bench $$suite --json runs/bench/$$suite.json || exit 1; \
	done
	if nvidia-smi > /dev/null 2>&1; then \
	  JAX_PLATFORMS=cuda,cpu $(BIN)/python -m segdiff_jax.bench gpu --json runs/bench/gpu.json; \
	fi

clean:
	rm -rf $(VENV) runs .jax_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# requirements.txt pins the whole environment of the runtime; the test extra pins its own.
$(VENV)/.runtime: requirements.txt pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --requirement requirements.txt
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

$(VENV)/.test: $(VENV)/.runtime
	$(BIN)/pip install --quiet --constraint requirements.txt --editable '.[test,app]'
	.ci/browser $(BIN)/playwright
	touch $@
