# make reproduce | test | lab | figures | lint | clean. Each sets up .venv first, once.
PYTHON ?= python3
PROFILE ?= quick
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# A mirror of the data beside the clone is used where there is one and nothing else was named.
ifndef DETRANSFORMER_DATA
ifneq ($(wildcard ../shared/data/.),)
export DETRANSFORMER_DATA := $(abspath ../shared/data)
endif
endif

.PHONY: help install reproduce test lab figures lint clean
help:
	@echo "make reproduce [PROFILE=quick|reference|laptop|paper]  every table and figure into results/PROFILE"
	@echo "make test        the tests"
	@echo "make lab         JupyterLab on the notebooks"
	@echo "make figures     redraw the figures of results/PROFILE from its tables"
	@echo "make lint        ruff"
	@echo "make clean       remove .venv and caches (results stay)"

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
	"Python 3.11 or newer is needed, and $(PYTHON) is %d.%d; name another one: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -e '.[dev]'
	@touch $@

reproduce: $(STAMP)
	$(BIN)/detransformer reproduce --profile $(PROFILE)

# Two files at a time, and one thread a process: parity tests start up to four processes on what may be two cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

lab: $(STAMP)
	PYTHONWARNINGS='ignore:IProgress not found' $(BIN)/jupyter lab --notebook-dir=notebooks

figures: $(STAMP)
	$(BIN)/detransformer figures results/$(PROFILE)

lint: $(STAMP)
	$(BIN)/ruff check lib tests
	$(BIN)/ruff format --check lib tests

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
	find lib tests notebooks -name __pycache__ -prune -exec rm -rf {} +
