# make fit | test | lint | env      Each makes the environment when it is missing.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= auto
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# The stamp carries what was installed, so that only a change of the requirements installs again.
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
PIP := $(VENV)/bin/python -m pip install --quiet --no-input --no-compile --constraint constraints.txt

.PHONY: env fit test lint
env: $(STAMP)

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; run make PYTHON=/path/to/it" if sys.version_info < (3, 11) else 0)'
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV), which takes some minutes the first time"
	@$(PIP) torch
	@$(PIP) --editable '.[dev,train]'
	@# Every command starts a Python; reading the packages' bytecode takes it a third of the time of compiling them.
	@$(VENV)/bin/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
	@rm -f $(VENV)/.installed-*
	@touch $@

fit: env
	$(VENV)/bin/python -m trainers.fit recipe=ilf_pixart

# One worker and one thread a core: torch's own threads would wait for one another.  JOBS=0 runs all in one process.
test: env
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses $(JOBS) --maxprocesses 8 --dist loadfile

lint: env
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy modules checkpoints $(wildcard kernels/*.py)
	$(VENV)/bin/codespell
