#!/usr/bin/env bash
# One command for a machine with CUDA GPUs and no network, 10 minutes in all: driver and topology, the
# tests marked gpu, GPT-2 124M's step in several ways, a real run, kill -9 and resume, sampling, and
# with several GPUs the strategies. --list prints the parts, --only PART runs one.
# Results appear in benchmarks/results/gpu-<device>.json as they come; the standard error of all
# commands is in the .log beside it. Files of an earlier check stay: the next has gpu-<device>-2.
# PYTHON: an interpreter with torch >= 2.11 and the other dependencies (`datasets` isn't needed).
# GPU_CHECK_CUDNN=0: torch doesn't use cuDNN for attention (where there is none).
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHONPATH=$PWD exec "${PYTHON:-python3}" scripts/gpu_check.py "$@"
