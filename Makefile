# Thin: the work is done by Snakemake (Snakefile) and by the scripts in book/tools.
#   make book [PROFILE=smoke|cpu|gpu] [PART=foundations|...]     make test     make html
#   make lab     make references     make lock     make clean

PYTHON  ?= python3
VENV    ?= .venv
TORCH   ?= torch==2.13.0
PROFILE ?= smoke
PART    ?= all
CORES   ?= 2

PY       := $(VENV)/bin/python
READY    := $(VENV)/.ready
UV       := $(PY) -m uv pip install --quiet --system-certs --python $(PY) --no-deps
BUILD     = exec $(PY) book/tools/build.py --parent $$PPID --cores $(CORES)
NOTEBOOKS = $(wildcard book/*/[0-9][0-9]-*.ipynb)

# Everything that tools like to write into the home folder stays in the checkout, so that a
# read-only home is no obstacle and `make clean` leaves nothing behind.
export FEEDFORWARD_CACHE ?= $(CURDIR)/.cache/feedforward
export XDG_CACHE_HOME    ?= $(CURDIR)/.cache/xdg
export MPLCONFIGDIR      ?= $(CURDIR)/.cache/matplotlib
export IPYTHONDIR        ?= $(CURDIR)/.cache/ipython
export JUPYTER_CONFIG_DIR ?= $(CURDIR)/.cache/jupyter/config
export JUPYTER_RUNTIME_DIR ?= $(CURDIR)/.cache/jupyter/runtime
export HF_HOME           ?= $(CURDIR)/.cache/huggingface
export OMP_WAIT_POLICY   ?= PASSIVE
export PYTHONUNBUFFERED  := 1

.DEFAULT_GOAL := book
.PHONY: book html references test lab env lock clean

book: $(READY)
	@$(BUILD) book --profile "$(PROFILE)" --part "$(PART)"

html: $(READY)
	@$(BUILD) html

references: $(READY)
	@$(BUILD) references --part "$(PART)"

test: $(READY)
	@exec $(PY) book/tools/check.py

lab: $(READY)
	@$(PY) -m jupyterlab --notebook-dir=. --ServerApp.preferred_dir=book

env: $(READY)

# torch first, so that the build that fits this machine is chosen; then the locked rest.
$(READY): requirements.lock pyproject.toml
	@echo "environment: $(VENV) (about 2 GB of packages; torch: $(TORCH))"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	@$(PY) -m pip install --quiet --disable-pip-version-check "$$(sed -n 's/^\(uv==[^ ]*\) .*/\1/p' requirements.lock)"
	@$(UV) --require-hashes -r requirements.lock \
	  || $(PY) -m pip install --quiet --no-deps --require-hashes -r requirements.lock
	@$(UV) --no-build-isolation --editable .
	@touch $@

lock: $(READY)
	@$(PY) book/tools/lock.py

clean:
	rm -rf _build .cache .snakemake
