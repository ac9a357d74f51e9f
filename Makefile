# Two commands, on a machine with Python 3.11 or newer and nothing else: make demo, make test.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test install bench gpu-pack clean

demo: install
	$(BIN)/clipfh demo --out demo

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

bench: install
	$(BIN)/python tests/benchmarks/run.py

# What a machine lacks that has a GPU, Python 3.12 with torch and no network: tests/gpu.sh there
gpu-pack: install
	$(BIN)/python tests/gpu_pack.py

install: .venv/installed

# No CPU-only torch: torchvision, which open_clip needs, fits the registry's own build alone.
.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "clipfh needs Python 3.11 or newer: make PYTHON=python3.12"'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf .venv demo
