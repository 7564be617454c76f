# The habits of this project. Every target that needs an environment makes it on first use and reuses it afterwards.
PYTHON ?= python3
VENV   ?= .venv
EXTRAS ?= dev
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed

.PHONY: help env quickstart demo browser-test test test-oldest integrations lint contract contract-all soak
.PHONY: tables docs gpu cpu-bench clean
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "%-12s %s\n", $$1, $$2}'

env: $(STAMP)  ## create the environment

$(STAMP): pyproject.toml setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "evavit needs Python 3.10 or newer, this is " + sys.version.split()[0] + "; set PYTHON=/path/to/python3")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet $(if $(PINS),--constraint $(PINS)) --editable '.[$(EXTRAS)]'
	touch $(STAMP)

QUICK := output/quickstart
ONE   := OMP_NUM_THREADS=1 # for tensors this small a second thread gains little, and costs much where it has to wait for a core
quickstart: $(STAMP)  ## train a small EVA model on Digits, a minute or two on two cores, and validate it
	$(PY) tools/build_digits.py data/digits
	rm -rf $(QUICK)
	$(ONE) $(PY) train.py -c configs/quickstart.yaml --data-dir data/digits --output $(dir $(QUICK)) --experiment $(notdir $(QUICK))
	$(ONE) $(PY) validate.py --checkpoint $(QUICK)/last.safetensors --data-dir data/digits --workers 0 \
		--results-file $(QUICK)/validation.json

demo: $(STAMP)  ## a page to try a model on: that of quickstart, or FLAGS='--checkpoint FILE'
	$(PY) -m pip install --quiet --editable '.[demo]'
	$(PY) examples/demo.py $(FLAGS)

browser-test: $(STAMP)  ## that page in a browser; needs chromium, which apt-get installs
	$(PY) -m pip install --quiet --editable '.[browser]'
	$(PY) -m pytest -q -m slow tests/examples/test_demo.py

lint: $(STAMP)  ## ruff and its format over the whole tree, mypy over evavit/
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test: $(STAMP)  ## the test suite, without the slow and gpu markers; kernels in Triton's interpreter, a process of their own
	$(ONE) $(PY) -m pytest -q -n auto --dist worksteal
	$(ONE) TRITON_INTERPRET=1 $(PY) -m pytest -q -n auto --dist worksteal -m interpreter tests/ops tests/training/data/device

PYTHON_OLDEST ?= python3.10
OLDEST        := .venv-oldest
test-oldest:  ## the same in .venv-oldest: Python 3.10 with the oldest versions that pyproject.toml allows
	mkdir -p $(OLDEST)
	grep -oE '"[A-Za-z0-9._-]+>=[0-9.]+' pyproject.toml | sed 's/"//; s/>=/==/' | sort -u > $(OLDEST)/pins.txt
	$(MAKE) test PYTHON=$(PYTHON_OLDEST) VENV=$(OLDEST) PINS=$(OLDEST)/pins.txt EXTRAS=test,quickstart,docs,export,dense

integrations: $(STAMP)  ## install what docs/integrations.md names beside it all, a large download, and run its tests
	$(PY) -m pip install --quiet --editable '.[dev,integrations]'
	$(ONE) $(PY) -m pytest -q -n auto tests/test_integrations.py tests/docs -k integrations

contract: $(STAMP)  ## timm's own model tests on our models
	$(ONE) $(PY) tools/contract.py -n auto

contract-all: $(STAMP)  ## the same in full on every attention's models, an hour or more
	$(ONE) $(PY) tools/contract.py --all -n auto

# On a machine with a GPU; PY=python3 takes the environment at hand, STEPS and ONLY name parts (tools/gpu.py --help).
gpu: $(if $(filter $(VENV)/%,$(PY)),$(STAMP))  ## on a GPU: measure all figures of docs/performance.md, then test the kernels and run compute-sanitizer
	$(PY) tools/gpu.py $(if $(STEPS),--steps $(STEPS)) $(if $(ONLY),--only $(ONLY))

CPU_BENCH := OMP_NUM_THREADS=2 $(PY) benchmark.py --device cpu -b 8 --repeats 10 --warmup 3 --results-file results/cpu.csv
CPU_784 := eva_deit_tiny_784 softmax_deit_tiny_784
CPU_MODELS := $(CPU_784) eva_deit_tiny softmax_deit_tiny eva_pvt_v2_b3 softmax_pvt_v2_b3
tables: $(STAMP)  ## write the tables and the plot of the documentation; CHECK=--check says which are stale
	$(PY) docs/make/tables.py $(CHECK)
	$(PY) docs/make/scaling.py $(CHECK)

SITE := $(VENV)/.site
$(SITE): $(STAMP)
	$(PY) -m pip install --quiet --editable '.[site]'
	touch $(SITE)

docs: tables $(SITE)  ## the tables, and the site in site/: a dead link or a missing docstring fails
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

cpu-bench: $(STAMP)  ## the models beside timm's on two CPU cores, ten minutes; make docs/performance.md
	$(CPU_BENCH) --bench infer --model $(CPU_MODELS)
	$(CPU_BENCH) --bench train --model $(CPU_784)
	$(CPU_BENCH) --torchcompile default --bench infer --model $(CPU_MODELS)
	$(CPU_BENCH) --torchcompile default --bench train --model $(CPU_784)
	$(PY) docs/make/tables.py

# A test may wait 20 times as long as it does alone before it says that a run hangs: the machine may be busy.
soak: $(STAMP)  ## every promise of docs/reliability.md, with what its tests measured; under an hour on two cores
	OMP_NUM_THREADS=1 EVAVIT_PATIENCE=20 $(PY) -m pytest -m 'soak and not gpu' --durations=0

clean:  ## remove the environments and build leftovers
	rm -rf $(VENV) $(OLDEST) site build dist .contract *.egg-info .pytest_cache .ruff_cache .mypy_cache
