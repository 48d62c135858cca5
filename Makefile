# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

TRAINING ?= build/training
MINUTES ?= 65

.PHONY: demo demo-model test test-fast lint clean

demo: $(READY)
	$(BIN)/python benchmarks/demo.py demo

# Trains the demo model from nothing (about 90 minutes on 2 cores) and puts it into the package; resumes if it was stopped.
demo-model: $(READY)
	mkdir -p $(TRAINING)
	$(BIN)/python -m training.pool --out $(TRAINING)
	$(BIN)/python -m training.pretrain --pool $(TRAINING)
	$(BIN)/python -m training.train --pool $(TRAINING) --out $(TRAINING)/out --minutes $(MINUTES)
	cp $(TRAINING)/out/*.safetensors $(TRAINING)/out/tokenizer.json export/demo_model/

test: lint
	$(BIN)/python -m pytest

test-fast: lint
	$(BIN)/python -m pytest -m "not slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf .venv demo build *.egg-info
