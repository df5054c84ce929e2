# Needs Python 3.11 or newer and make; everything else goes into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: demo test test-fast models bench docs pictures lint clean

demo: $(READY)  ## fine-tune, save, load, merge and unmerge a real pretrained encoder
	$(BIN)/python docs/examples/quickstart.py

# One thread a worker: two workers that each want both cores would mostly wait for one another.
test: $(READY)  ## the whole suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

test-fast: $(READY)  ## without the tests that are marked slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow"

models: $(READY)  ## docs/models.md, from a run of the zoo
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup tests/peft/test_zoo.py --models-page docs/models.md

bench: $(READY)  ## what an adapter costs, next to the frozen base and to other libraries: out/bench/
	$(BIN)/python -m lorafx bench

docs: $(READY)  ## README.md, docs/ and the docstrings as pages: out/site; any warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

pictures: $(READY)  ## docs/images, by a browser: needs Chromium
	$(BIN)/python docs/images/draw.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and pinned: an unpinned torch may bring gigabytes of CUDA.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev,docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
