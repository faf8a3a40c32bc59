"""Rows of a batch that begin with padding: prompts of several lengths end at the same place."""

from torch import Tensor, arange


def padded_positions(padding: Tensor, past: int, end: int) -> Tensor:
    """Return the positions of the tokens ``past`` to ``end`` of rows that begin with padding.

    Args:
        padding: (B,) int64, the leading entries of each row that are no tokens.

    Returns:
        (B, end - past) int64; 0 for padding.
    """
    places = arange(past, end, device=padding.device)
    return (places - padding[:, None]).clamp(min=0)


def padding_mask(padding: Tensor, past: int, end: int) -> Tensor:
    """Return the attention mask of the tokens ``past`` to ``end``, (B, 1, end - past, end) bool.

    A token sees itself and the earlier tokens that are no padding. Padding sees itself, because
    the softmax over nothing is NaN.
    """
    keys = arange(end, device=padding.device)
    queries = keys[past:, None]
    visible = (keys <= queries) & (keys >= padding[:, None, None]) | (keys == queries)
    return visible[:, None]
