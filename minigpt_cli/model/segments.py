"""Segments of packed sequences: positions, the attention mask, boundaries."""

import torch
import torch.nn.functional as F
from torch import Tensor


def segment_positions(segment_ids: Tensor) -> Tensor:
    """Return each token's position in its segment, (B, T) int64: 0, 1, 2 ... from each start."""
    positions = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    starts = F.pad(segment_ids.diff(dim=1) != 0, (1, 0), value=True)
    return positions - positions.where(starts, 0).cummax(dim=1).values


def segment_mask(segment_ids: Tensor) -> Tensor:
    """Return the attention mask, (B, 1, T, T) bool: true for earlier tokens of the same segment."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return same.tril()[:, None]


def segment_boundaries(segment_ids: Tensor, count: int | None = None) -> Tensor:
    """Return where each segment starts, counted over all rows, and at the end B * T.

    Args:
        segment_ids: (B, T), the segment of each token in its row.
        count: segments of all rows. None: they are counted, which waits for the device.

    Returns:
        (count + 1,) int32, ascending.
    """
    starts = F.pad(segment_ids.diff(dim=1) != 0, (1, 0), value=True)
    numbers = starts.flatten().cumsum(0)  # of each token's segment, from 1
    count = int(numbers[-1]) if count is None else count
    # Segment n + 1 starts at the first token whose number is above n.
    wanted = torch.arange(count + 1, device=numbers.device)
    return torch.searchsorted(numbers, wanted, right=True, out_int32=True)
