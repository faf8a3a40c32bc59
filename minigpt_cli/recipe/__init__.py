"""The recipe: frozen dataclasses read from TOML, with all problems listed at once.

A value comes from the command line (``--set section.key=value``), else from the recipe's file, else
from the default in schema.py; ``Recipe.origin`` remembers which. ``dump_recipe`` writes the
resolved recipe with each value's origin in a comment, and ``load_recipe`` reads it back.
"""

from minigpt_cli.recipe.dump import dump_recipe
from minigpt_cli.recipe.parse import load_recipe, parse_recipe
from minigpt_cli.recipe.schema import (
    AdapterSettings,
    CheckpointSettings,
    DataSource,
    DataTokenizer,
    DistributedSettings,
    GuardSettings,
    LoraSettings,
    ModelSettings,
    OptimizerSettings,
    Origin,
    PrecisionSettings,
    Recipe,
    RopeScaling,
    ScheduleSettings,
)
from minigpt_cli.recipe.tables import changed_settings, setting_names
from minigpt_cli.recipe.validate import out_of_range

__all__ = [
    "AdapterSettings",
    "CheckpointSettings",
    "DataSource",
    "DataTokenizer",
    "DistributedSettings",
    "GuardSettings",
    "LoraSettings",
    "ModelSettings",
    "OptimizerSettings",
    "Origin",
    "PrecisionSettings",
    "Recipe",
    "RopeScaling",
    "ScheduleSettings",
    "changed_settings",
    "dump_recipe",
    "load_recipe",
    "out_of_range",
    "parse_recipe",
    "setting_names",
]
