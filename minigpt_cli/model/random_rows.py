"""Random values of a matrix by position, so that a rank draws only the rows that it holds."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

BLOCK = 2**18  # elements that one generator draws


def random_rows(
    shape: torch.Size,
    begin: int,
    end: int,
    seed: int,
    draw: Callable[[Tensor, torch.Generator], object],
) -> Tensor:
    """Draw the rows ``begin`` to ``end`` (exclusive) of a matrix.

    The flattened matrix is cut into blocks of ``BLOCK`` elements. Block i has a generator of its
    own, seeded by ``seed + i``. So a row's values don't depend on which other rows are drawn. A
    torch.Generator uses 32 bits of its seed; consecutive seeds differ in them.

    Args:
        shape: of the whole matrix; its first dimension counts the rows.
        seed: of the matrix.
        draw: fills a tensor (the first argument) in place with a generator (the second).

    Returns:
        (end - begin, ...) float32 on the CPU.
    """
    columns = math.prod(shape[1:])
    first, last, size = begin * columns, end * columns, shape[0] * columns
    rows = torch.empty(last - first)

    def draw_block(index: int) -> None:
        start, stop = index * BLOCK, min((index + 1) * BLOCK, size)
        generator = torch.Generator().manual_seed(seed + index)
        if first <= start and stop <= last:
            draw(rows[start - first : stop - first], generator)
            return
        block = torch.empty(stop - start)
        draw(block, generator)
        low, high = max(start, first), min(stop, last)
        rows[low - first : high - first] = block[low - start : high - start]

    blocks = range(first // BLOCK, -(-last // BLOCK)) if last > first else range(0)
    if len(blocks) < 2 or torch.get_num_threads() == 1:
        for index in blocks:
            draw_block(index)
    else:  # torch draws without the GIL
        with ThreadPoolExecutor(min(len(blocks), torch.get_num_threads())) as pool:
            list(pool.map(draw_block, blocks))
    return rows.view(end - begin, *shape[1:])
