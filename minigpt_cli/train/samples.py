"""Fixed prompts, completed at each evaluation, to show the model's progress."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from minigpt_cli.generate.sampling import SamplingOptions
from minigpt_cli.generate.text import join_chunks, stream_text
from minigpt_cli.model.compiled import run_eagerly
from minigpt_cli.model.gpt import GPT

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Prompts:
    """The prompts of a run.

    Attributes:
        texts: the recipe's ``[eval] prompts``.
        tokenizer: the run's.
        eos_id: the token that ends a completion.
        max_new_tokens: of each completion.
        dtype: of matrix products.
    """

    texts: tuple[str, ...]
    tokenizer: "Tokenizer"
    eos_id: int
    max_new_tokens: int
    dtype: torch.dtype

    def complete(self, model: GPT) -> Iterator[tuple[str, str]]:
        """Yield (prompt, completion) for each prompt, by greedy decoding."""
        for text in self.texts:
            pieces = stream_text(
                model,
                self.tokenizer,
                self.tokenizer.encode(text, add_special_tokens=False).ids,
                SamplingOptions(temperature=0.0),
                max_new_tokens=self.max_new_tokens,
                eos_id=self.eos_id,
                dtype=self.dtype,
            )
            with run_eagerly(model):
                completion = join_chunks(pieces)[0].text
            yield text, completion
