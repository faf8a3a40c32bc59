"""Which windows of the training split make up optimizer step s: a pure function of (seed, step).

An epoch visits every window once, in the order of a keyed bijection of ``range(windows)``: a
Feistel network over the next power of four (Luby and Rackoff 1988), walked along its cycle until it
lands inside the range (Black and Rogaway 2002). Nothing is stored, so a run is resumed by its step
number alone, at any number of devices, and 10^12 tokens cost as little as a small corpus.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8


def sample_ids(seed: int, step: int, global_batch: int, windows: int) -> NDArray[np.int64]:
    """The windows of one optimizer step.

    Args:
        seed: the run's seed; another seed is another order.
        step: optimizer steps done before this one.
        global_batch: windows per step, over all devices. A step may reach into the next epoch.
        windows: how many there are in the training split.

    Returns:
        (global_batch,) int64 in [0, windows). O(global_batch) time and memory.
    """
    assert windows > 0
    assert step >= 0
    positions = step * global_batch + np.arange(global_batch, dtype=np.int64)
    epochs, index = np.divmod(positions, windows)
    ids = np.empty_like(index)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        ids[here] = permute(index[here], windows, f"{seed}:{epoch}")
    return ids


def permute(index: NDArray[np.int64], size: int, key: str) -> NDArray[np.int64]:
    """Where the bijection of ``range(size)`` named by ``key`` sends each of ``index``."""
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
    """SplitMix64's finalizer (Steele et al. 2014): every input bit sways every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
