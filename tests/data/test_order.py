import hashlib
import tracemalloc

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt_cli.data.order import permute, sample_ids


def by_hand(index: int, size: int, key: str) -> int:
    """The bijection one number at a time, in Python's own integers."""
    digest = hashlib.shake_256(key.encode()).digest(64)
    keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(8)]
    bits = max(1, -(-(size - 1).bit_length() // 2))
    mask, wrap = (1 << bits) - 1, (1 << 64) - 1
    while True:
        left, right = index >> bits, index & mask
        for each in keys:
            x = right ^ each
            x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & wrap
            x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & wrap
            left, right = right, left ^ ((x ^ (x >> 31)) & mask)
        index = left << bits | right
        if index < size:
            return index


@given(size=st.integers(1, 2000), key=st.text(max_size=8))
def test_permute_is_a_bijection(size: int, key: str):
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


@given(size=st.integers(1, 2**50), key=st.text(max_size=8), data=st.data())
def test_permute_equals_plain_integers(size: int, key: str, data: st.DataObject):
    index = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5))
    got = permute(np.array(index), size, key)
    assert got.tolist() == [by_hand(i, size, key) for i in index]


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**40),
    sequences=st.integers(1, 300),
    batch=st.integers(1, 70),
)
def test_an_epoch_covers_each_window_once(seed: int, sequences: int, batch: int):
    steps = -(-3 * sequences // batch)
    order = np.concatenate([sample_ids(seed, step, batch, sequences) for step in range(steps)])
    for epoch in range(3):
        seen = order[epoch * sequences : (epoch + 1) * sequences]
        assert sorted(seen) == list(range(sequences))


@given(step=st.integers(0, 10**6), batch=st.integers(1, 64), cut=st.integers(1, 64))
def test_order_is_independent_of_steps(step: int, batch: int, cut: int):
    whole = sample_ids(7, step, batch * cut, 1000)
    parts = [sample_ids(7, step * cut + i, batch, 1000) for i in range(cut)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_epochs_and_seeds_differ():
    first, second = (sample_ids(1, step, 1000, 1000) for step in (0, 1))
    other_seed = sample_ids(2, 0, 1000, 1000)
    for other in (second, other_seed):
        assert (first == other).sum() < 10  # 1 expected by chance
    assert abs(np.corrcoef(first, np.arange(1000))[0, 1]) < 0.15
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.15


def test_a_trillion_tokens_need_no_array():
    sequences = 10**12 // 1024
    sample_ids(0, 0, 512, sequences)
    tracemalloc.start()
    ids = sample_ids(0, 10**6, 512, sequences)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000
    assert len(set(ids.tolist())) == 512
    assert ids.min() >= 0
    assert ids.max() < sequences


def test_the_order_is_frozen():
    """Another order would break the resume of every run there is."""
    assert sample_ids(1337, 0, 6, 1000).tolist() == [by_hand(i, 1000, "1337:0") for i in range(6)]
    assert sample_ids(1337, 0, 4, 10**9).tolist() == FROZEN


FROZEN = [475872406, 103863688, 607519276, 444350627]
