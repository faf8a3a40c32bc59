"""A training sequence as text, with what the loss counts."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from minigpt_cli.core.console import counted, printable
from minigpt_cli.data.loader import Sequences
from minigpt_cli.data.packing import PackedSequences

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class TextPart:
    """Neighbouring tokens of a sequence that the loss counts, or doesn't.

    Attributes:
        text: of the tokens, special ones included.
        tokens: how many they are.
        in_loss: whether the model is trained to write them.
    """

    text: str
    tokens: int
    in_loss: bool


def sequence_parts(
    sequences: Sequences, index: int, tokenizer: "Tokenizer"
) -> list[list[TextPart]]:
    """Return the text of one sequence: for each example in it its parts; one list for a text.

    The first token of a text is not in the loss, but stands with those that are.
    """
    if isinstance(sequences, PackedSequences):
        split = sequences.split
        found = [split.document(number) for number, _ in sequences.documents(index)]
    else:
        start = index * sequences.sequence_length
        tokens = sequences.split.slice(start, start + sequences.sequence_length + 1)
        found = [(tokens, tokens >= 0)]
    examples = []
    for tokens, loss_mask in found:
        pairs = zip(tokens.tolist(), loss_mask.tolist(), strict=True)
        parts = []
        for in_loss, group in groupby(pairs, key=lambda pair: pair[1]):
            ids = [token for token, _ in group]
            text = tokenizer.decode(ids, skip_special_tokens=False)
            parts.append(TextPart(text, len(ids), in_loss))
        examples.append(parts)
    return examples


def sequence_lines(examples: list[list[TextPart]], sequence_length: int) -> Iterator[str]:
    """Yield lines for a person: ``+`` before what the loss counts."""
    is_text = len(examples) == 1 and all(part.in_loss for part in examples[0])
    for number, parts in enumerate(examples, 1):
        tokens = sum(part.tokens for part in parts)
        if not is_text:
            counts = sum(part.tokens for part in parts if part.in_loss)
            yield f"example {number}: {counted(tokens, 'token')}, {counts:,} in the loss"
        for part in parts:
            for line in part.text.split("\n"):
                mark = "+" if part.in_loss else " "
                yield f"{mark} | {printable(line, keep=chr(9))}".rstrip()
    # An example of n tokens takes n - 1 positions: its last token is only a target.
    taken = sum(sum(part.tokens for part in parts) - 1 for parts in examples)
    padding = sequence_length - taken
    if padding > 0:
        yield f"padding: {counted(padding, 'token')}"
