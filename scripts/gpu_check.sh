#!/usr/bin/env bash
# One command for a machine with a CUDA GPU and no network: runs the tests marked gpu, trains
# recipes/tiny.toml, measures a GPT-2 124M step, and writes benchmarks/results/gpu-<device>.json.
# PYTHON: an interpreter with torch >= 2.11 and the other dependencies (`datasets` isn't needed).
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHONPATH=$PWD exec "${PYTHON:-python3}" scripts/gpu_check.py "$@"
