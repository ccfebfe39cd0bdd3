# make demo   create the environment when it is missing, install, run the main job
# make test   the same environment, then the tests
# make bench  benchmarks; ONLY=name runs those whose name contains it, ARGS=--quick tries them
# make lint   ruff and pyright

PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2
ONLY    ?=
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test bench lint clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.installed-base
	@rm -rf runs/demo
	$(BIN)/deltaworks tune --output runs/demo $(ARGS)

# One thread per worker: torch would otherwise start a thread per core in each of them.
test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

bench: $(VENV)/.installed-bench
	$(BIN)/python -m bench $(if $(ONLY),--only $(ONLY)) $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11; run: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp per extra: installation is repeated only when what is to be installed has changed.
$(VENV)/.installed-base: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-%: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable '.[$*]'
	@touch $@
