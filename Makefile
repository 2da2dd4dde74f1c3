# Every target sets up what it needs: a virtual environment of its own for each Python and set of packages.
#   make PYTHON=python3.13 test                    another Python
#   make PYTHON=python3.13 PACKAGES=newest test    what pip resolves today, in place of what was tested
PYTHON ?= python3
PACKAGES ?= tested
# tested: constraints/3.11.txt and so on; lowest: the least that pyproject.toml allows; newest: no constraints

# A Python that pyenv keeps answers to its name only where PYENV_VERSION says so.
ask = $(shell $(1) -c $(2) 2>/dev/null || PYENV_VERSION=$(1:python%=%) $(1) -c $(2) 2>/dev/null)
EXECUTABLE := $(call ask,$(PYTHON),'import sys; print(sys.executable)')
VERSION := $(call ask,$(PYTHON),'import sys; print("%d.%d" % sys.version_info[:2])')
PYTHONS = $(foreach name,python3.11 python3.12 python3.13 python3.14,$(if $(call ask,$(name),'print(1)'),$(name)))
CONSTRAINTS := $(wildcard constraints/$(if $(filter tested,$(PACKAGES)),$(VERSION),$(PACKAGES)).txt)
VENV := .venv/$(VERSION)$(if $(filter-out tested,$(PACKAGES)),-$(PACKAGES))
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: help demo demo-grpo figures compare regime base test newest isa matrix faults docs-check lint format environment constraints clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(READY): pyproject.toml $(CONSTRAINTS)
	@$(or $(EXECUTABLE),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "pvm-jax needs Python 3.11 or newer, and $(PYTHON) is none: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(EXECUTABLE) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS:%=--constraint %) --editable '.[dev,demo]'
	@touch $@

demo: $(READY)  ## convert the shipped tiny checkpoint, fine-tune its PVM branch, generate, measure what changed
	$(BIN)/python -m demo.run

demo-grpo: $(READY)  ## refine what demo trained by GRPO, over three seeds, and plot the held-out reward
	$(BIN)/python -m demo.grpo

FIGURES := out/demo/report/figures
figures: demo  ## the README's figures, out of the demo's report
	cp $(FIGURES)/filler.svg $(FIGURES)/dilution.svg docs/
	cp $(FIGURES)/looked_5.svg docs/looked.svg

compare: $(READY)  ## base, LoRA, full fine-tuning and the branch on the demo's task over three seeds, about an hour
	$(BIN)/python -m demo.compare

regime: $(READY)  ## what lets the branch learn to look: its first stage, one thing at a time changed, about an hour
	$(BIN)/python -m demo.regime

base: $(READY)  ## train the tiny checkpoint that the demo starts from, about an hour (demo/base must be empty)
	$(BIN)/python -m demo.pretrain

test: $(READY)  ## the tests, on the CPU
	$(BIN)/python -m pytest --numprocesses 2 --dist loadscope $(TEST_OPTIONS)

NEWEST := $(addprefix tests/,pvm_jax/test_golden.py pvm_jax/test_generation.py train/test_step.py convert demo test_docs.py)
newest:  ## goldens, training steps, generation and conversion with the newest packages of today, on the newest Python
	$(MAKE) PYTHON=$(lastword $(PYTHONS)) PACKAGES=newest TEST_OPTIONS='$(NEWEST)' test

isa: $(READY)  ## the numeric tests with SSE4.2, AVX2 and AVX-512, errors beside their bars
	$(BIN)/python -m tests.isa

matrix: $(READY)  ## the tests on every Python that is here, as a table
	$(BIN)/python -m tests.matrix $(PYTHONS)

faults: $(READY)  ## the slow tests: kill runs of SFT and GRPO thirty times, which must change nothing (minutes)
	$(BIN)/python -m pytest -m slow

docs-check: $(READY)  ## run every command in docs/ that needs neither accelerator nor cloud
	$(BIN)/python -m tests.check_docs

lint: $(READY)  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(READY)  ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

environment:  ## where the environment of PYTHON and PACKAGES is
	@echo $(VENV)

constraints: $(READY)  ## renew the versions that a fresh machine gets: pip's choice of today, for every Python that is here
	$(BIN)/python -m tests.constraints $(PYTHONS)

clean:  ## remove the virtual environment and what runs wrote
	rm -rf .venv out
