"""Choose the training sequences of each optimizer step: a pure function of (seed, step).

An epoch visits every sequence once, in the order of a keyed bijection of ``range(num_sequences)``:
a Feistel network over the next power of four (Luby and Rackoff 1988), walked along its cycle until
it lands inside the range (Black and Rogaway 2002). Nothing is stored. So a run is resumed from its
step number alone, on any number of devices, and 10^12 tokens cost as little as a small corpus.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8


def sample_ids(seed: int, step: int, global_batch: int, num_sequences: int) -> NDArray[np.int64]:
    """Return the sequences of one optimizer step.

    Args:
        seed: the run's seed. Another seed gives another order.
        step: optimizer steps done before this one.
        global_batch: sequences per step, over all devices. A step may reach into the next epoch.
        num_sequences: sequences in the training split.

    Returns:
        int64 [global_batch], in [0, num_sequences). O(global_batch) time and memory.
    """
    assert num_sequences > 0
    assert step >= 0
    positions = step * global_batch + np.arange(global_batch, dtype=np.int64)
    epochs, index = np.divmod(positions, num_sequences)
    ids = np.empty_like(index)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        ids[here] = permute(index[here], num_sequences, f"{seed}:{epoch}")
    return ids


def permute(index: NDArray[np.int64], size: int, key: str) -> NDArray[np.int64]:
    """Apply the bijection of ``range(size)`` that ``key`` selects.

    Args:
        index: int64 [n], in [0, size).
        size: the size of the range.
        key: any text. Another key gives another bijection.

    Returns:
        int64 [n], in [0, size).
    """
    digest = hashlib.shake_256(key.encode()).digest(8 * _ROUNDS)
    round_keys = np.frombuffer(digest, dtype="<u8")
    half_bits = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    mask = (np.uint64(1) << half_bits) - np.uint64(1)

    out = index.astype(np.uint64)
    outside = np.ones(out.shape, dtype=bool)
    while outside.any():  # at most 4 values in the network's domain for each in ours
        left, right = out[outside] >> half_bits, out[outside] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        out[outside] = (left << half_bits) | right
        outside = out >= size
    return out.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply SplitMix64's finalizer (Steele et al. 2014): each input bit affects each output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
