"""Train a byte-level BPE tokenizer on the beginning of a corpus."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from minigpt_cli.core.errors import UserError
from minigpt_cli.data.tokenizer import EOS, as_text_only

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MIN_VOCAB = 257  # the 256 bytes, and EOS

TRAINING_BYTES = 100_000_000  # used of a corpus, so that time and memory don't grow with it

# The trainer buffers 256 texts and counts distinct words. Short pieces and a limit on runs without
# white space (base64, minified code) bound its memory. Such a run's end gives no useful token.
_TRAINING_PIECE = 16_384  # characters
_TRAINING_RUN = 1_000  # characters


def train_bpe(texts: Iterator[str], vocab_size: int) -> "Tokenizer":
    """Train a byte-level BPE tokenizer: 256 bytes, merges, and ``EOS``.

    The result depends on the counts of the words in ``texts``, not on their order. At most the
    first ``TRAINING_BYTES`` of text are used, and the first 1,000 characters of a run without white
    space.

    Args:
        texts: The training text.
        vocab_size: Number of entries. The tokenizer has fewer if the text has nothing left to
            merge.

    Returns:
        The tokenizer. It encodes special tokens in a text as text.

    Raises:
        UserError: ``vocab_size`` is less than ``MIN_VOCAB``.
    """
    check_vocab_size(vocab_size)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_pieces(texts), trainer=trainer)
    return as_text_only(tokenizer)


def check_vocab_size(vocab_size: int) -> None:
    """Check that a tokenizer of this size can be trained.

    Raises:
        UserError: it is less than ``MIN_VOCAB``.
    """
    if vocab_size < MIN_VOCAB:
        raise UserError(
            f"a vocabulary of {vocab_size} is too small: byte-level BPE needs 256 bytes and {EOS}; "
            f"ask for at least {MIN_VOCAB}"
        )


def _training_pieces(texts: Iterator[str]) -> Iterator[str]:
    long_run = re.compile(rf"(\S{{{_TRAINING_RUN}}})\S+")
    left = TRAINING_BYTES
    for text in texts:
        start = 0
        while start < len(text) and left > 0:
            end = min(len(text), start + _TRAINING_PIECE)
            if end < len(text):  # end at white space if there is any, so that no word is cut
                space = max(text.rfind(" ", start + 1, end), text.rfind("\n", start + 1, end))
                end = space if space > 0 else end
            piece = text[start:end]
            yield long_run.sub(r"\1", piece)
            left -= len(piece.encode())
            start = end
        if left <= 0:
            return
