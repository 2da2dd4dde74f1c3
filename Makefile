# Every target sets up what it needs: a virtual environment for each Python and set of packages.
#   make PYTHON=python3.13 test                    another Python
#   make PYTHON=python3.13 PACKAGES=newest test    what pip resolves today, not what was tested
PYTHON ?= python3
PACKAGES ?= tested
# tested: constraints/tested.txt, on every Python, so that one gets another's figures; lowest: the
# least that pyproject.toml allows; newest: no constraints

# A Python that pyenv keeps answers to its name only where PYENV_VERSION says so.
ask = $(shell $(1) -c $(2) 2>/dev/null || PYENV_VERSION=$(1:python%=%) $(1) -c $(2) 2>/dev/null)
EXECUTABLE := $(call ask,$(PYTHON),'import sys; print(sys.executable)')
VERSION := $(call ask,$(PYTHON),'import sys; print("%d.%d" % sys.version_info[:2])')
NAMES := python3.11 python3.12 python3.13 python3.14
PYTHONS = $(foreach name,$(NAMES),$(if $(call ask,$(name),'print(1)'),$(name)))
CONSTRAINTS := $(wildcard constraints/$(PACKAGES).txt)
VENV := .venv/$(VERSION)$(if $(filter-out tested,$(PACKAGES)),-$(PACKAGES))
BIN := $(VENV)/bin
READY := $(VENV)/ready
DOCS := $(VENV)/docs

.PHONY: help demo demo-lora demo-grpo figures compare regime base test newest isa matrix faults \
  docs docs-check lint format environment constraints clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(READY): pyproject.toml $(CONSTRAINTS)
	@$(or $(EXECUTABLE),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "pvm-jax needs Python 3.11 or newer, and $(PYTHON) is none:" \
	    "make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(EXECUTABLE) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS:%=--constraint %) --editable '.[dev,demo]'
	@touch $@

demo: $(READY)  ## convert the shipped tiny checkpoint, train its branch, generate, measure
	$(BIN)/python -m demo.run

demo-lora: $(READY)  ## LoRA of the branch's size, measured beside what demo trained (10 min)
	$(BIN)/python -m demo.lora

demo-grpo: $(READY)  ## refine what demo trained by GRPO, over three seeds; plot the held-out reward
	$(BIN)/python -m demo.grpo

FIGURES := out/demo/compared/figures
figures: demo-lora  ## the README's figures and numbers, out of the report with LoRA
	cp $(FIGURES)/filler.svg $(FIGURES)/ahead.svg $(FIGURES)/dependency.svg docs/
	cp $(FIGURES)/looked_3.svg docs/looked.svg
	cp $(FIGURES)/../report.json demo/results/

compare: $(READY)  ## base, LoRA, full fine-tuning, the branch on equal terms, three seeds (hours)
	$(BIN)/python -m demo.compare

regime: $(READY)  ## the branch's first stage with one thing at a time changed (1 h)
	$(BIN)/python -m demo.regime

base: $(READY)  ## train the checkpoint that the demo starts from into an empty demo/base (1 h)
	$(BIN)/python -m demo.pretrain

test: $(READY)  ## the tests, on the CPU
	$(BIN)/python -m pytest --numprocesses 2 --dist loadscope $(TEST_OPTIONS)

NEWEST := pvm_jax/test_golden.py pvm_jax/test_generation.py pvm_jax/test_options.py convert demo
NEWEST := $(addprefix tests/,$(NEWEST) train/test_step.py test_docs.py)
newest:  ## what a change of packages breaks first, with the newest of today on the newest Python
	$(MAKE) PYTHON=$(lastword $(PYTHONS)) PACKAGES=newest TEST_OPTIONS='$(NEWEST)' test

isa: $(READY)  ## the numeric tests with SSE4.2, AVX2 and AVX-512, errors beside their bars
	$(BIN)/python -m tests.isa

matrix: $(READY)  ## the tests on every Python here, and with the lowest and newest packages
	$(BIN)/python -m tests.matrix $(PYTHONS)

faults: $(READY)  ## the slow tests: thirty kills, a wheel installed, what others show once
	$(BIN)/python -m pytest -m slow

$(DOCS): $(READY)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS:%=--constraint %) --editable '.[docs]'
	@touch $@

docs: $(DOCS)  ## the documents as a site with an API reference, in out/site
	$(BIN)/mkdocs build --strict

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

constraints: $(READY)  ## renew what a fresh machine gets: pip's choice today on the oldest Python
	$(BIN)/python -m tests.constraints

clean:  ## remove the virtual environment and what runs wrote
	rm -rf .venv out
