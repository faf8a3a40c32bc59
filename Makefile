# Everything runs in .venv, which `setup` makes; nothing else has to be installed.
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/tiny
FAULTS := --kills 200
FUZZ := --cases 20000 --minutes 10

.PHONY: setup train test test-slow faults fuzz old-runs nullgpu nullgpu-budgets harness docs docs-test check \
	bench bench-full bench-table clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# Train a small model on the Python standard library's own source, then sample from it.
train: setup
	if ls -d $(RUN)/checkpoints/step-* >/dev/null 2>&1; then $(BIN)/minigpt resume $(RUN); \
	else $(BIN)/minigpt pretrain recipes/tiny.toml --out $(RUN); fi
	$(BIN)/minigpt sample $(RUN) --prompt '    def __init__(self' --top-p 0.95 --seed 1337 --max-new-tokens 160

# Two files at a time; more threads would only compete for the cores.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

# More of the same, some 10 minutes.
test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m slow

# Hundreds of kills, signals, full disks and false files; prints a table of the survived ones.
faults: setup
	$(BIN)/python -m tests.faults $(FAULTS)

# Thousands of mutated files, environments and command lines; prints a table of the handled ones.
# With large pages a fork of the process that has imported torch takes half as long.
fuzz: setup
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 PYTHONMALLOC=malloc $(BIN)/python -m tests.fuzz $(FUZZ)

# Continue runs of commit 93d8a84 with its code and with today's; compare the results bit by bit.
old-runs: setup
	$(BIN)/python scripts/old_runs.py compare

# torch's CUDA path on a GPU that computes nothing; an environment of its own, about 6 GB.
nullgpu: .venv-nullgpu/installed
	.venv-nullgpu/bin/pytest tests/nullgpu

# Renew the table of launches and memory after a change that is meant to change it.
nullgpu-budgets: .venv-nullgpu/installed
	budgets=$$(.venv-nullgpu/bin/python -m tests.nullgpu.budgets) && echo "$$budgets" >tests/nullgpu/budgets.json

.venv-nullgpu/installed: pyproject.toml
	$(PYTHON) -m venv .venv-nullgpu
	.venv-nullgpu/bin/pip install --quiet torch==2.14.1
	.venv-nullgpu/bin/pip install --quiet -e . pytest
	touch $@

# minigpt eval --tasks against the harness's own backend for transformers. lm-eval brings 340 MB, so it
# has an environment of its own, which sees the packages of .venv.
harness: .venv-harness/installed
	OMP_NUM_THREADS=1 .venv-harness/bin/python -m pytest tests/evaluate/test_harness.py

.venv-harness/installed: .venv/installed
	$(PYTHON) -m venv .venv-harness
	base=$$(realpath .venv/lib/python3*/site-packages) && cd .venv-harness/lib/python3*/site-packages && \
		echo "import site; site.addsitedir('$$base')" >base.pth
	.venv-harness/bin/pip install --quiet -c constraints.txt lm-eval
	touch $@

# The documentation as a site in build/site, in an environment of its own.
docs: .venv-docs/installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

.venv-docs/installed: docs/requirements.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet -r docs/requirements.txt
	touch $@

# Every command of README.md and docs/, with small settings.
docs-test: setup
	$(BIN)/python scripts/run_docs.py $(PAGES)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# minigpt beside nanoGPT, litgpt and transformers; under 15 minutes on 2 cores, on a quiet machine.
# NANOGPT: a checkout of nanoGPT; SHAKESPEARE: tiny Shakespeare's text. What isn't given isn't measured.
BENCH = $(BIN)/python -m benchmarks.bench $(if $(NANOGPT),--nanogpt $(NANOGPT)) \
	$(if $(SHAKESPEARE),--shakespeare $(SHAKESPEARE)) $(BENCH_OPTIONS)
bench: setup .venv-peers/installed
	$(BENCH)
	$(BIN)/python -m benchmarks.table

# Also recipes/tiny.toml with three seeds, and how a step's cost grows with each size.
bench-full: setup .venv-peers/installed
	$(BENCH) --full
	$(BIN)/python -m benchmarks.table

# The README's table and the plots, from benchmarks/results.
bench-table: setup
	$(BIN)/python -m benchmarks.table

# The peers see the packages of .venv, so torch and transformers are those of constraints.txt. litgpt
# wants an older huggingface_hub than transformers, but its model doesn't use it: --no-deps.
.venv-peers/installed: .venv/installed
	$(PYTHON) -m venv .venv-peers
	base=$$(realpath .venv/lib/python3*/site-packages) && cd .venv-peers/lib/python3*/site-packages && \
		echo "import site; site.addsitedir('$$base')" >base.pth
	.venv-peers/bin/pip install --quiet -c constraints.txt --no-deps \
		litgpt==0.5.13 lightning==2.6.6 lightning-utilities==0.15.3 pytorch-lightning==2.6.6 torchmetrics==1.9.0
	touch $@

clean:
	rm -rf .venv .venv-nullgpu .venv-harness .venv-docs .venv-peers runs data build *.egg-info
