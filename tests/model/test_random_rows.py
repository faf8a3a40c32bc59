"""Random rows: the same values however they are cut."""

import pytest
import torch

from minigpt_cli.model.random_rows import BLOCK, random_rows

SHAPE = torch.Size([1000, 700])  # 2.7 blocks


def normal(values: torch.Tensor, generator: torch.Generator) -> None:
    values.normal_(0.0, 0.5, generator=generator)


def whole(seed: int = 7) -> torch.Tensor:
    """What random_rows should return, by its description."""
    sizes = (BLOCK, BLOCK, 1000 * 700 - 2 * BLOCK)
    generators = (torch.Generator().manual_seed(seed + index) for index in range(3))
    blocks = [torch.randn(n, generator=g) for n, g in zip(sizes, generators, strict=True)]
    return (0.5 * torch.cat(blocks)).view(SHAPE)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("ranks", [1, 3, 8, 1001])
def test_rows_are_the_same_for_any_number_of_ranks(ranks: int, threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        chunk = -(-1000 // ranks)
        cuts = [(min(rank * chunk, 1000), min((rank + 1) * chunk, 1000)) for rank in range(ranks)]
        shown = cuts if ranks < 100 else [cuts[0], cuts[374], cuts[375], cuts[-2], cuts[-1]]
        expected = whole()
        for begin, end in shown:
            drawn = random_rows(SHAPE, begin, end, 7, normal)
            assert drawn.shape == (end - begin, 700)
            assert torch.equal(drawn, expected[begin:end])
    finally:
        torch.set_num_threads(before)


def test_blocks_are_unlike_one_another():
    """Also of matrices whose seeds differ only in what a torch.Generator ignores."""
    blocks = torch.cat([whole(1).flatten()[: 2 * BLOCK], whole(2**40 + 17).flatten()[: 2 * BLOCK]])
    correlation = torch.corrcoef(blocks.view(4, BLOCK))
    assert (correlation - torch.eye(4)).abs().max() < 6 / BLOCK**0.5
    assert blocks.std().item() == pytest.approx(0.5, rel=0.005)
