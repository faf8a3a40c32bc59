"""Measure what no program on this machine can pass: bf16 matrix products, and reads of memory.

    python -m benchmarks.machine_limits

Prints one JSON object: GFLOP/s of each timed product, for square matrices and for those of the
compared models, and GB/s of reading an array that no cache holds.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch

from benchmarks.shapes import BATCH, TOKENS, VOCAB, shape

READ_BYTES = 1 << 29


def products() -> list[tuple[int, int, int]]:
    """Return (rows, inner, columns) of the products to time."""
    c, rows = shape("gpt2"), BATCH * TOKENS
    squares = [(n, n, n) for n in (1024, 2048, 4096)]
    return [*squares, (rows, c.hidden_size, c.intermediate_size), (rows, c.hidden_size, VOCAB)]


def rates(work: float, run: Callable[[], object], repeat: int) -> list[float]:
    """Return ``work`` per nanosecond of each of ``repeat`` runs, after two others."""
    found = []
    for _ in range(2 + repeat):
        began = time.perf_counter()
        run()
        found.append(round(1e-9 * work / (time.perf_counter() - began), 2))
    return found[2:]


def product_rates(rows: int, inner: int, columns: int, repeat: int) -> list[float]:
    """Return GFLOP/s."""
    a, b = torch.randn(rows, inner).bfloat16(), torch.randn(columns, inner).bfloat16()
    out = torch.empty(rows, columns, dtype=torch.bfloat16)
    return rates(2 * rows * inner * columns, lambda: torch.mm(a, b.T, out=out), repeat)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=10)
    repeat = parser.parse_args().repeat
    found = {" x ".join(map(str, each)): product_rates(*each, repeat) for each in products()}
    array = torch.ones(READ_BYTES // 4)
    reads = rates(READ_BYTES, array.sum, repeat)
    print(json.dumps({"products": found, "reads": reads}))


if __name__ == "__main__":
    main()
