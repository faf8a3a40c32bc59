"""The recipe: frozen dataclasses read from TOML, with every problem listed at once.

A value comes from the command line (``--set section.key=value``), else from the recipe's file, else
from the default in sections.py; ``Recipe.origin`` remembers which. ``dump`` writes the resolved
recipe with each value's origin in a comment, ``load`` reads such a file back with its origins.
"""

from minigpt_cli.recipe.file import differences, dump, load, parse, settings
from minigpt_cli.recipe.sections import (
    Adapter,
    Checkpoint,
    DataSource,
    DataTokenizer,
    Distributed,
    Guard,
    Lora,
    Optimizer,
    Origin,
    Precision,
    Recipe,
    RopeScaling,
    Schedule,
)

__all__ = [
    "Adapter",
    "Checkpoint",
    "DataSource",
    "DataTokenizer",
    "Distributed",
    "Guard",
    "Lora",
    "Optimizer",
    "Origin",
    "Precision",
    "Recipe",
    "RopeScaling",
    "Schedule",
    "differences",
    "dump",
    "load",
    "parse",
    "settings",
]
