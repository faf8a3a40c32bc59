"""Train a byte-level BPE tokenizer on the beginning of a corpus."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from minigpt_cli.core.errors import UserError
from minigpt_cli.data.tokenizer import EOS, as_text_only

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MIN_VOCAB = 257  # the bytes and EOS

# Training sees the beginning of the corpus, so that its memory and time don't grow with the corpus.
TRAINING_BYTES = 100_000_000

# The trainer buffers 256 texts and counts distinct words: short pieces and a limit on runs without
# white space (base64, minified code) bound both. No useful token comes out of the tail of such a
# run.
_TRAINING_PIECE = 16_384
_TRAINING_RUN = 1_000


def train_bpe(texts: Iterator[str], vocab_size: int) -> "Tokenizer":
    """Train a byte-level BPE tokenizer with ``vocab_size`` entries: 256 bytes, merges, and ``EOS``.

    Deterministic in the order-independent counts of the words in ``texts``. At most the first
    ``TRAINING_BYTES`` of text are used; of a run of more than 1,000 characters without white space
    only the first 1,000 count. The result has fewer entries when the text has nothing left to
    merge.

    Raises ``UserError`` when ``vocab_size`` can't hold the bytes and ``EOS``.
    """
    if vocab_size < MIN_VOCAB:
        raise UserError(
            f"a vocabulary of {vocab_size} is too small: byte-level BPE needs 256 bytes and {EOS}; "
            f"ask for at least {MIN_VOCAB}"
        )
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


def _training_pieces(texts: Iterator[str]) -> Iterator[str]:
    long_run = re.compile(rf"(\S{{{_TRAINING_RUN}}})\S+")
    left = TRAINING_BYTES
    for text in texts:
        start = 0
        while start < len(text) and left > 0:
            end = min(len(text), start + _TRAINING_PIECE)
            if end < len(text):  # end at white space if there is some, so that no word is torn
                space = max(text.rfind(" ", start + 1, end), text.rfind("\n", start + 1, end))
                end = space if space > 0 else end
            piece = text[start:end]
            yield long_run.sub(r"\1", piece)
            left -= len(piece.encode())
            start = end
        if left <= 0:
            return
