"""Every setting is documented, and something reads it."""

import ast
import dataclasses
from collections import defaultdict
from collections.abc import Iterator

from minigpt_cli.model.config import ModelConfig
from minigpt_cli.recipe import schema
from scripts import recipe_table
from tests.helpers.processes import ROOT

SECTIONS = {
    name: value
    for name, value in vars(schema).items()
    if isinstance(value, type)
    and dataclasses.is_dataclass(value)
    and value not in (schema.Range, schema.Recipe)
}
# By which name a section is reached: ``recipe.train`` or ``run.recipe.data.source``.
REACHED_BY = {
    "source": schema.DataSource, "tokenizer": schema.DataTokenizer, "data": schema.DataSettings,
    "rope_scaling": schema.RopeScaling, "model": schema.ModelSettings,
    "train": schema.TrainSettings, "optimizer": schema.OptimizerSettings,
    "schedule": schema.ScheduleSettings, "precision": schema.PrecisionSettings,
    "distributed": schema.DistributedSettings, "checkpoint": schema.CheckpointSettings,
    "eval": schema.EvalSettings, "guard": schema.GuardSettings, "log": schema.LogSettings,
    "lora": schema.LoraSettings, "config": ModelConfig,
}  # fmt: skip


def test_the_table_is_made_from_the_schema():
    page = recipe_table.PAGE.read_text()
    assert recipe_table.with_table(page) == page, "run: python scripts/recipe_table.py"
    for row in (
        "| `train.seed` | integer of at least 0 | `1337` | of weights, data order and dropout |",
        '| `optimizer.name` | `"adamw"` or `"muon"` | `"adamw"` | ',
        "| `optimizer.betas` | 2 numbers of at least 0 and below 1 | `[0.9, 0.95]` | of AdamW |",
        "| `model.num_key_value_heads` | integer above 0 and at most 1,000,000 | `num_attention",
        "| `data.source.kind` | ",
    ):
        assert row in page


def test_something_reads_every_setting():
    read = defaultdict(set)
    for section, name in reads():
        for kind in (section, *section.__mro__):  # an adapter's settings are LoRA's too
            read[kind].add(name)
    read[schema.LoraSettings] |= read[schema.AdapterSettings]
    # config_from_recipe() hands all settings of [model] to a ModelConfig, by name
    read[schema.ModelSettings] |= {field.name for field in dataclasses.fields(ModelConfig)}
    unread = {
        f"{section.__name__}.{field.name}"
        for section in (*SECTIONS.values(), ModelConfig)
        for field in dataclasses.fields(section)
        if field.name not in read[section]
    }
    assert unread == set()
    assert "seed" not in read[schema.OptimizerSettings]  # the search doesn't find everything


def reads() -> Iterator[tuple[type, str]]:
    """Find (section, setting) wherever the package reads one, besides the recipe's own checks."""
    for path in (ROOT / "minigpt_cli").rglob("*.py"):
        if path.name in ("validate.py", "parse.py", "dump.py", "tables.py"):
            continue
        tree = ast.parse(path.read_text())
        named = annotated(tree)
        for section in ast.walk(tree):  # the sections' own methods
            if isinstance(section, ast.ClassDef) and section.name in SECTIONS:
                kind = SECTIONS[section.name]
                yield from ((kind, attr) for owner, attr in attributes(section) if owner == "self")
        for owner, attr in attributes(tree):
            for kind in {REACHED_BY.get(owner), *named[owner]} - {None}:
                yield kind, attr


def attributes(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Return (owner's last name, attribute) for each attribute that is read."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield last_name(node.value), node.attr


def last_name(node: ast.AST) -> str:
    name = getattr(node, "id", getattr(node, "attr", ""))
    return name.removeprefix("_")


def annotated(tree: ast.AST) -> dict[str, set[type]]:
    """Return the sections of names that are annotated with one or assigned from one."""
    found = defaultdict(set)
    kinds = SECTIONS | {"ModelConfig": ModelConfig}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation is not None:
            words = {getattr(each, "id", "") for each in ast.walk(node.annotation)}
            found[node.arg] |= {kinds[word] for word in words & kinds.keys()}
        elif isinstance(node, ast.Assign):
            (target,) = node.targets[:1]
            targets, values = [target], [node.value]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                targets, values = target.elts, node.value.elts
            for each, value in zip(targets, values, strict=False):  # fewer where one is starred
                if kind := REACHED_BY.get(last_name(value)):
                    found[last_name(each)].add(kind)
    return found
