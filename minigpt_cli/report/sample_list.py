"""samples.jsonl -> for each prompt, some completions from the whole run."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minigpt_cli.core.errors import Damaged
from minigpt_cli.core.reading import open_regular
from minigpt_cli.core.run_dir import SAMPLES

MAX_COMPLETIONS, MAX_PROMPTS = 24, 20
_MAX_CHARACTERS = 2000  # of a completion that are shown
_MAX_LINE, _MAX_BYTES = 1 << 20, 1 << 30


@dataclass(frozen=True)
class PromptSamples:
    """The completions of one prompt.

    Attributes:
        prompt: its text.
        completions: (step, text), ascending by step; at most twice ``MAX_COMPLETIONS``, the first
            and the last always among them. A text with more than 2,000 characters is cut.
        count: how many there are in the file.
    """

    prompt: str
    completions: list[tuple[int, str]]
    count: int


def list_samples(run: Path) -> list[PromptSamples]:
    """Read samples.jsonl of a run: the first ``MAX_PROMPTS`` prompts; none if there is no file.

    Raises:
        Damaged: it can't be read.
    """
    file = run / SAMPLES
    found: dict[str, _Kept] = {}
    if not (file.is_symlink() or file.exists()):
        return []
    with open_regular(file, Damaged, _MAX_BYTES) as stream:
        while line := stream.readline(_MAX_LINE):
            row = _row(line)
            if row is None or (row[1] not in found and len(found) == MAX_PROMPTS):
                continue
            step, prompt, completion = row
            found.setdefault(prompt, _Kept()).add(step, completion)
    return [PromptSamples(prompt, kept.all(), kept.count) for prompt, kept in found.items()]


@dataclass
class _Kept:
    """Every ``stride``-th completion of a prompt, and the last one, however many there are."""

    count: int = 0
    stride: int = 1
    regular: list[tuple[int, str]] = field(default_factory=list)
    last: tuple[int, str] = (0, "")

    def add(self, step: int, completion: str) -> None:
        self.last = (step, completion)
        if self.count % self.stride == 0:
            self.regular.append(self.last)
            if len(self.regular) == 2 * MAX_COMPLETIONS:
                self.regular = self.regular[::2]
                self.stride *= 2
        self.count += 1

    def all(self) -> list[tuple[int, str]]:
        return self.regular if self.regular[-1] is self.last else [*self.regular, self.last]


def _row(line: bytes) -> tuple[int, str, str] | None:
    try:
        row: Any = json.loads(line)
        step, prompt, completion = (row[key] for key in ("step", "prompt", "completion"))
    except (ValueError, RecursionError, KeyError, TypeError):  # torn by a power cut
        return None
    if type(step) is not int or type(prompt) is not str or type(completion) is not str:
        return None
    cut = completion if len(completion) <= _MAX_CHARACTERS else f"{completion[:_MAX_CHARACTERS]}..."
    return step, prompt[:_MAX_CHARACTERS], cut
