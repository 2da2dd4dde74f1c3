# Every target sets up what it needs, the virtual environment included.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo demo-grpo figures compare regime base test faults docs-check lint format clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "pvm-jax needs Python 3.11 or newer; say which: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev,demo]'
	@touch $@

demo: .venv/ready  ## convert the shipped tiny checkpoint, fine-tune its PVM branch, generate, measure what changed
	$(BIN)/python -m demo.run

demo-grpo: .venv/ready  ## refine what demo trained by GRPO, over three seeds, and plot the held-out reward
	$(BIN)/python -m demo.grpo

FIGURES := out/demo/report/figures
figures: demo  ## the README's figures, out of the demo's report
	cp $(FIGURES)/filler.svg $(FIGURES)/dilution.svg docs/
	cp $(FIGURES)/looked_5.svg docs/looked.svg

compare: .venv/ready  ## base, LoRA, full fine-tuning and the branch on the demo's task over three seeds, about an hour
	$(BIN)/python -m demo.compare

regime: .venv/ready  ## what lets the branch learn to look: its first stage, one thing at a time changed, about an hour
	$(BIN)/python -m demo.regime

base: .venv/ready  ## train the tiny checkpoint that the demo starts from, about an hour (demo/base must be empty)
	$(BIN)/python -m demo.pretrain

test: .venv/ready  ## the tests, on the CPU
	$(BIN)/python -m pytest --numprocesses 2 --dist loadscope

faults: .venv/ready  ## the slow tests: kill runs of SFT and GRPO thirty times, which must change nothing (minutes)
	$(BIN)/python -m pytest -m slow

docs-check: .venv/ready  ## run every command in docs/ that needs neither accelerator nor cloud
	$(BIN)/python -m tests.check_docs

lint: .venv/ready  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/ready  ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the virtual environment and what runs wrote
	rm -rf .venv out
