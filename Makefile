# Everything runs in .venv, which `setup` makes; nothing else has to be installed.
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/tiny

.PHONY: setup train test faults old-runs check bench clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# Trains a small model on the Python standard library's own source, then lets it write.
train: setup
	if ls -d $(RUN)/checkpoints/step-* >/dev/null 2>&1; then $(BIN)/minigpt resume $(RUN); \
	else $(BIN)/minigpt pretrain recipes/tiny.toml --out $(RUN); fi
	$(BIN)/minigpt sample $(RUN) --prompt '    def __init__(self' --top-p 0.95 --seed 1337 --max-new-tokens 160

# Two files at a time; with more threads they would only be in each other's way.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

# Hundreds of kills, signals, full disks and lies; prints a table of those survived.
faults: setup
	$(BIN)/python -m tests.faults --kills 200

# Runs, datasets and adapters that commit 93d8a84 makes: the same results, bit for bit.
old-runs: setup
	$(BIN)/python scripts/old_runs.py compare

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python benchmarks/bench_tokenize.py
	$(BIN)/python benchmarks/bench_startup.py

clean:
	rm -rf .venv runs data build *.egg-info
