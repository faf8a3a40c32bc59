"""Pack documents of different lengths into sequences of one length, with little padding.

Best fit, longest first: each document goes into the sequence that has the least room left for it.
So neighbouring sequences hold documents of like lengths; `order.sample_ids` mixes them.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from minigpt_cli.core.constants import IGNORE_INDEX
from minigpt_cli.data.dataset import TokenSplit
from minigpt_cli.data.order import permute


@dataclass(frozen=True)
class PackedSequences:
    """Whole documents of a split of instructions, in sequences of one length.

    Every sequence has at least one target that the loss counts.

    Attributes:
        split: where the documents come from.
        sequence_length: predicted tokens of a sequence.
        num_too_long: documents that don't fit a sequence. They are in none.
        fill: fraction of all positions that documents take; 0 if there is no sequence.
    """

    split: TokenSplit
    sequence_length: int
    num_too_long: int
    fill: float
    _order: NDArray[np.int64] = field(repr=False)  # [documents], sequence by sequence
    _starts: NDArray[np.int64] = field(repr=False)  # [sequences + 1]: documents before each

    @property
    def num_sequences(self) -> int:
        """The number of sequences."""
        return len(self._starts) - 1

    @property
    def num_documents(self) -> int:
        """The documents in all sequences."""
        return len(self._order)

    def gather(
        self, ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Read sequences by number.

        The documents of a sequence follow each other. A document of n tokens gives n - 1 inputs and
        n - 1 targets.

        Args:
            ids: int64 [n], in [0, ``num_sequences``).

        Returns:
            (inputs, targets, segment_ids), each int64 [n, sequence_length]. ``targets`` is
            ``IGNORE_INDEX`` where the loss doesn't count: prompts and padding. ``segment_ids``
            numbers the documents of a sequence from 0. Padding is end-of-text and has the number
            after the last document's.

        Raises:
            Damaged: a token isn't in the vocabulary.
        """
        ids = np.asarray(ids, dtype=np.int64)
        assert ids.ndim == 1, ids.shape
        available = self.num_sequences
        assert not len(ids) or (ids.min() >= 0 and ids.max() < available), (ids, available)
        shape = (len(ids), self.sequence_length)
        inputs = np.full(shape, self.split.eos_id, dtype=np.int64)
        targets = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        segment_ids = np.empty(shape, dtype=np.int64)
        for index, x, y, segments in zip(ids.tolist(), inputs, targets, segment_ids, strict=True):
            start = 0
            members = self._members(index)
            for segment, number in enumerate(members):
                tokens, loss_mask = self.split.document(number)
                stop = start + len(tokens) - 1
                x[start:stop] = tokens[:-1]
                np.copyto(y[start:stop], tokens[1:], where=loss_mask[1:])
                segments[start:stop] = segment
                start = stop
            segments[start:] = len(members)
        return inputs, targets, segment_ids

    def documents(self, index: int) -> list[tuple[int, list[int]]]:
        """Return (number in the split, tokens) of every document in the sequence ``index``."""
        return [
            (number, self.split.document(number)[0].tolist()) for number in self._members(index)
        ]

    def _members(self, index: int) -> list[int]:
        assert 0 <= index < self.num_sequences, (index, self.num_sequences)
        return self._order[self._starts[index] : self._starts[index + 1]].tolist()


def pack(split: TokenSplit, sequence_length: int, seed: int) -> PackedSequences:
    """Pack the documents of at most ``sequence_length + 1`` tokens into sequences.

    The result depends on the documents' lengths, ``sequence_length`` and ``seed`` alone. The seed
    changes the places of documents that have the same length. O(n log n) for n documents.
    """
    assert sequence_length > 0, sequence_length
    assert split.offsets is not None, "a split of text"
    needs = np.diff(split.offsets) - 1  # positions that each document takes
    fitting = np.flatnonzero(needs <= sequence_length)
    if len(fitting):
        fitting = fitting[permute(np.arange(len(fitting)), len(fitting), f"{seed}:packing")]
    longest_first = fitting[np.argsort(-needs[fitting], kind="stable")]
    sequences = _best_fit(needs[longest_first].tolist(), sequence_length)
    count = int(sequences.max()) + 1 if len(sequences) else 0
    taken = int(needs[longest_first].sum())
    sizes = np.bincount(sequences, minlength=count)
    return PackedSequences(
        split,
        sequence_length,
        num_too_long=len(needs) - len(fitting),
        fill=taken / (count * sequence_length) if count else 0.0,
        _order=longest_first[np.argsort(sequences, kind="stable")],
        _starts=np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)]),
    )


def _best_fit(needs: list[int], capacity: int) -> NDArray[np.int64]:
    """Return, int64 [n], the sequence of each need: the fullest that has room, else a new one."""
    with_room: list[list[int]] = [[] for _ in range(capacity)]  # sequences by positions left
    rooms = 0  # bit r is set if a sequence has exactly r positions left
    sequences = np.empty(len(needs), dtype=np.int64)
    count = 0
    for i, need in enumerate(needs):
        enough = rooms >> need
        if enough:
            room = need + (enough & -enough).bit_length() - 1
            sequence = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, sequence = capacity, count
            count += 1
        sequences[i] = sequence
        left = room - need
        if left:
            with_room[left].append(sequence)
            rooms |= 1 << left
    return sequences
