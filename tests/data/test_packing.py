"""Packing: unpacked by brute force, every document is there once, as it was."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from minigpt_cli.core.errors import Damaged
from minigpt_cli.data.dataset import TokenSplit, split_in_memory
from minigpt_cli.data.loader import Batch, BatchLoader
from minigpt_cli.data.order import sample_ids
from minigpt_cli.data.packing import PackedSequences, pack

EOS = 7
VOCAB = 500


def split_of(lengths: list[int] | NDArray[np.int64], seed: int = 0) -> TokenSplit:
    """Random documents of these lengths, each with a token that the loss counts."""
    random = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    loss_mask = random.random(offsets[-1]) < 0.5
    loss_mask[offsets[:-1]] = False
    loss_mask[offsets[1:] - 1] = True
    tokens = random.integers(0, VOCAB, offsets[-1]).astype(np.uint16)
    return split_in_memory(
        tokens, vocab_size=VOCAB, eos_id=EOS, loss_mask=loss_mask, offsets=offsets
    )


def unpacked(packed: PackedSequences, length: int) -> list[tuple[list[int], list[int]]]:
    """(inputs, targets) of every document in every sequence; checks the padding on the way."""
    found = []
    for index in range(packed.num_sequences):
        inputs, targets, segment_ids = (each[0] for each in packed.gather(np.array([index])))
        assert inputs.dtype == targets.dtype == segment_ids.dtype == np.int64
        assert inputs.shape == targets.shape == segment_ids.shape == (length,)
        members = len(packed.documents(index))
        padding = segment_ids == members
        assert (inputs[padding] == EOS).all()
        assert (targets[padding] == -100).all()
        assert (np.diff(segment_ids) >= 0).all()  # each in one piece, one after the other
        assert set(segment_ids[~padding]) == set(range(members))
        for segment in range(members):
            here = segment_ids == segment
            found.append((inputs[here].tolist(), targets[here].tolist()))
        assert (targets != -100).any()
    return found


@given(
    lengths=st.lists(st.integers(2, 40), max_size=60),
    length=st.integers(1, 45),
    seed=st.integers(0, 3),
)
def test_every_document_that_fits_is_in_one_sequence(
    lengths: list[int], length: int, seed: int
) -> None:
    split = split_of(lengths)
    packed = pack(split, length, seed)
    expected = []
    for number in range(len(lengths)):
        tokens, loss_mask = (each.tolist() for each in split.document(number))
        if len(tokens) - 1 <= length:
            targets = [
                token if counts else -100 for token, counts in zip(tokens, loss_mask, strict=True)
            ]
            expected.append((tokens[:-1], targets[1:]))
    assert sorted(unpacked(packed, length)) == sorted(expected)
    assert packed.num_documents == len(expected)
    assert packed.num_too_long == len(lengths) - len(expected)
    positions = sum(len(inputs) for inputs, _ in expected)
    assert packed.fill == (positions / (packed.num_sequences * length) if expected else 0)


def test_gather_keeps_order() -> None:
    packed = pack(split_of([9, 8, 7, 6, 5, 9]), 10, 0)
    assert packed.num_sequences > 3
    alone = [packed.gather(np.array([index])) for index in (2, 0, 2)]
    together = packed.gather(np.array([2, 0, 2]))
    for i in range(3):
        assert np.array_equal(np.concatenate([each[i] for each in alone]), together[i])
    assert packed.gather(np.array([], dtype=np.int64))[0].shape == (0, 10)
    with pytest.raises(AssertionError):
        packed.gather(np.array([packed.num_sequences]))


def test_documents_of_a_sequence() -> None:
    split = split_of([5, 30, 3, 6])
    packed = pack(split, 12, 0)
    seen = [entry for index in range(packed.num_sequences) for entry in packed.documents(index)]
    assert sorted(number for number, _ in seen) == [0, 2, 3]
    for number, tokens in seen:
        assert tokens == split.document(number)[0].tolist()
    inputs, _, segment_ids = packed.gather(np.array([0]))
    first = packed.documents(0)[0][1]
    assert inputs[0][segment_ids[0] == 0].tolist() == first[:-1]


def test_packing_depends_on_lengths_and_seed_alone() -> None:
    lengths = np.random.default_rng(1).integers(2, 60, 500)
    packed = [
        pack(split_of(lengths, tokens), 64, seed) for tokens, seed in ((0, 5), (1, 5), (0, 6))
    ]
    sequences = [
        [[n for n, _ in each.documents(index)] for index in range(each.num_sequences)]
        for each in packed
    ]
    assert sequences[0] == sequences[1]
    assert sequences[0] != sequences[2]


@pytest.mark.parametrize(
    "draw",
    [
        lambda random, n: random.integers(2, 1026, n),
        lambda random, n: random.lognormal(5, 1, n).astype(int).clip(2, 1025),
        lambda random, n: np.full(n, 129),
    ],
)
def test_random_lengths_leave_little_padding(draw: object) -> None:
    lengths = draw(np.random.default_rng(3), 20_000)  # type: ignore[operator]
    assert pack(split_of(lengths), 1024, 0).fill > 0.98


def test_all_documents_too_long() -> None:
    packed = pack(split_of([12, 13]), 10, 0)
    assert (packed.num_sequences, packed.num_documents, packed.num_too_long, packed.fill) == (
        0,
        0,
        2,
        0.0,
    )


def test_a_token_outside_of_the_vocabulary_is_located() -> None:
    tokens = np.arange(15)
    tokens[6] = VOCAB
    offsets = np.array([0, 4, 9, 15])
    split = split_in_memory(
        tokens, vocab_size=VOCAB, eos_id=EOS, loss_mask=tokens > 0, offsets=offsets
    )
    packed = pack(split, 5, 0)
    bad = next(index for index in range(3) if packed._members(index) == [1])
    message = "token 500 at offset 6 is outside"
    for read in (packed.documents, lambda index: packed.gather(np.array([index]))):
        with pytest.raises(Damaged, match=message):
            read(bad)
    assert packed.documents((bad + 1) % 3)


def test_micro_batches_of_a_step_know_their_segments() -> None:
    packed = pack(split_of([5, 9, 3, 16, 2, 2, 7, 11, 4]), 20, 0)
    step = {"seed": 1, "global_batch_size": 8, "local_slice": slice(0, 6)}
    loader = BatchLoader(packed, **step, device=torch.device("cpu"))
    try:
        batch = loader(3)
    finally:
        loader.close()
    ids = sample_ids(1, 3, 8, packed.num_sequences)[:6]
    expected = packed.gather(ids)
    parts = list(batch.micro_batches(2))
    assert len(parts) == 3
    for whole, rows in zip(expected, zip(*(part[:3] for part in parts), strict=True), strict=True):
        assert np.array_equal(torch.cat(rows).numpy(), whole)
    for index, part in enumerate(parts):
        segments = expected[2][2 * index : 2 * index + 2]
        assert part[3] == sum(len(set(row)) for row in segments.tolist())


def test_micro_batches_of_texts_have_no_segments() -> None:
    tokens = torch.arange(12).view(3, 4)
    parts = list(Batch(tokens, tokens + 1, None).micro_batches(2))
    assert [(x.tolist(), y.tolist(), *rest) for x, y, *rest in parts] == [
        ([[0, 1, 2, 3], [4, 5, 6, 7]], [[1, 2, 3, 4], [5, 6, 7, 8]], None, None),
        ([[8, 9, 10, 11]], [[9, 10, 11, 12]], None, None),
    ]
