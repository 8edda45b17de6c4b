# make demo: install, simulate a cohort, harmonize it.  make test: install and run the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
STAMP := $(VENV)/.installed
DEMO ?= demo
# Neural methods are tested on the CPU; the default build of torch is several GB larger.
TORCH := torch==$(shell sed -n 's/^torch==//p' constraints.txt)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: demo test lint docs bench clean

$(STAMP): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --no-deps "$(TORCH)+cpu" 2>/dev/null \
	  || $(PIP) --no-deps --index-url $(TORCH_INDEX) "$(TORCH)" \
	  || echo "no CPU build of torch was found: the default one is installed"
	$(PIP) --constraint constraints.txt --editable ".[test]" mypy ruff types-PyYAML
	touch $@

demo: $(STAMP)
	rm -rf $(DEMO)
	$(BIN)/bids_harmony-phantom $(DEMO)/raw --subjects 6 --resolution 2 \
	  --sites mprage3 spgr15 biased3
	$(BIN)/bids_harmony $(DEMO)/raw $(DEMO)/out participant --method nyul --reference mprage3 \
	  --sloppy --work-dir $(DEMO)/work
	@echo "Open the reports:"; ls $(DEMO)/out/sub-*.html

test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)
	$(PIP) --constraint constraints.txt --editable ".[docs]"
	$(BIN)/sphinx-build -W -b html docs docs/_build

bench: $(STAMP)
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/preprocess.py
	$(BIN)/python -m benchmarks.flows

clean:
	rm -rf $(VENV) $(DEMO) docs/_build build *.egg-info
