"""Examples of different lengths -> rows of one length, with little padding.

Best fit, longest first: each example goes into the row that has the least room left for it. The
rows' order carries the lengths' order; `order.sample_ids` draws rows in one that doesn't.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from minigpt_cli.core.constants import IGNORE_INDEX
from minigpt_cli.data.instruction_dataset import ExampleSplit
from minigpt_cli.data.order import permute


@dataclass(frozen=True)
class PackedSequences:
    """Whole examples of ``split`` in rows of ``sequence_length`` predicted tokens.

    ``left_out`` counts the examples that are too long for a row, ``fill`` is the share of all rows'
    positions that examples take, 0 without rows. Every row has at least one target that counts.
    """

    split: ExampleSplit
    sequence_length: int
    left_out: int
    fill: float
    _order: NDArray[np.int64] = field(repr=False)  # [examples], row by row
    _starts: NDArray[np.int64] = field(repr=False)  # [rows + 1]: examples before each row

    @property
    def num_sequences(self) -> int:
        """The number of rows."""
        return len(self._starts) - 1

    @property
    def examples(self) -> int:
        return len(self._order)

    def gather(
        self, ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return (inputs, targets, segment_ids), each int64 [n, sequence_length], of the rows with
        these numbers (int64 [n]).

        A row's examples follow each other; of one with n tokens, n - 1 are inputs and n - 1
        targets. ``targets`` is ``IGNORE_INDEX`` where the loss doesn't count: prompts and padding.
        ``segment_ids`` numbers the row's examples from 0; padding, whose inputs are end-of-text,
        has the number after the last one's.

        Raises ``Damaged`` when a token isn't in the vocabulary.
        """
        ids = np.asarray(ids, dtype=np.int64)
        assert ids.ndim == 1, ids.shape
        assert not len(ids) or (ids.min() >= 0 and ids.max() < self.num_sequences), (
            ids,
            self.num_sequences,
        )
        shape = (len(ids), self.sequence_length)
        inputs = np.full(shape, self.split.eos_id, dtype=np.int64)
        targets = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        segment_ids = np.empty(shape, dtype=np.int64)
        for i, row in enumerate(ids.tolist()):
            members = self._members(row)
            at = 0
            for segment, example in enumerate(members):
                tokens, trained = self.split.example(example)
                here = slice(at, at + len(tokens) - 1)
                inputs[i, here] = tokens[:-1]
                targets[i, here] = np.where(trained[1:], tokens[1:], IGNORE_INDEX)
                segment_ids[i, here] = segment
                at = here.stop
            segment_ids[i, at:] = len(members)
        return inputs, targets, segment_ids

    def texts(self, row: int) -> list[tuple[int, list[int]]]:
        """Return (example's number in the split, its tokens) for every example of a row."""
        return [(number, self.split.example(number)[0].tolist()) for number in self._members(row)]

    def _members(self, row: int) -> list[int]:
        assert 0 <= row < self.num_sequences, (row, self.num_sequences)
        return self._order[self._starts[row] : self._starts[row + 1]].tolist()


def pack(split: ExampleSplit, sequence_length: int, seed: int) -> PackedSequences:
    """Put the examples of at most ``sequence_length + 1`` tokens into rows.

    Deterministic in the examples' lengths, ``sequence_length`` and ``seed``, by which examples of
    one length change places. O(n log n) for n examples.
    """
    assert sequence_length > 0, sequence_length
    needs = np.diff(split.offsets) - 1  # positions that each example takes
    fitting = np.flatnonzero(needs <= sequence_length)
    if len(fitting):
        fitting = fitting[permute(np.arange(len(fitting)), len(fitting), f"{seed}:packing")]
    longest_first = fitting[np.argsort(-needs[fitting], kind="stable")]
    rows = _best_fit(needs[longest_first].tolist(), sequence_length)
    count = int(rows.max()) + 1 if len(rows) else 0
    taken = int(needs[longest_first].sum())
    return PackedSequences(
        split,
        sequence_length,
        left_out=split.examples - len(fitting),
        fill=taken / (count * sequence_length) if count else 0.0,
        _order=longest_first[np.argsort(rows, kind="stable")],
        _starts=np.concatenate(
            [np.zeros(1, np.int64), np.cumsum(np.bincount(rows, minlength=count), dtype=np.int64)]
        ),
    )


def _best_fit(needs: list[int], capacity: int) -> NDArray[np.int64]:
    """Return the row (int64 [n]) of each need: the fullest one that has room, else a new one."""
    with_room: list[list[int]] = [[] for _ in range(capacity)]  # rows by the positions left
    rooms = 0  # bit r is set when there is a row with room for r more
    rows = np.empty(len(needs), dtype=np.int64)
    count = 0
    for i, need in enumerate(needs):
        enough = rooms >> need
        if enough:
            room = need + (enough & -enough).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, count
            count += 1
        rows[i] = row
        left = room - need
        if left:
            with_room[left].append(row)
            rooms |= 1 << left
    return rows
