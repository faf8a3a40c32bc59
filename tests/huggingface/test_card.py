"""The model card is valid YAML and shows names as they are; PyYAML and markdown-it are oracles."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import markdown_it
import pytest
import yaml

from minigpt_cli.core.console import printable
from minigpt_cli.huggingface.adapter import LoadedAdapter
from minigpt_cli.huggingface.base_model import BaseModel, open_base
from minigpt_cli.huggingface.card import model_card
from minigpt_cli.recipe import AdapterSettings
from tests.helpers.models import saved_model

NAMES = [
    "runs/tiny", "org/Name-1.0_b", "a: b", "- a", "'quoted\" name", "a\n---\nlicense: mit", "---",
    "tags:", "x](http://evil) ![y](z)", "<script>alert(1)</script>", "a | b | c", "`code` **b**",
    "# a", "{front}", "yes", "null", "1e3", "%tag", "@x", "\x1b[2J", "naïve 東京 \U0001f600", "\\",
    "_a_ ~~b~~ &lt;", "C:\\x", "half \udce9", "\u202eabc", "",
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, license_dataset: Path) -> BaseModel:
    return open_base(saved_model("llama", tmp_path_factory.mktemp("llama"), license_dataset)[1])


def parsed(card: str) -> tuple[Any, list[str], list[str]]:
    """(the front matter, the headings, the table's cells)"""
    _, front, text = card.split("---\n", 2)
    tokens = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    found: dict[str, list[str]] = {"heading_open": [], "td_open": []}
    for before, token in itertools.pairwise(tokens):
        if before.type in found:
            kinds = {child.type for child in token.children or []}
            assert kinds <= {"text", "text_special"}, kinds  # no link, no HTML, no emphasis
            shown = "".join(child.content for child in token.children or [])
            found[before.type].append(shown)
    return yaml.safe_load(front), found["heading_open"], found["td_open"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("alone", [False, True])
def test_names_are_only_names(base: BaseModel, name: str, alone: bool):
    adapter = LoadedAdapter(name, AdapterSettings(), {})
    front, headings, cells = parsed(model_card(replace(base, name=name), name, adapter, alone))
    library = "peft" if alone else "transformers"
    assert front == {
        "library_name": library, "base_model": printable(name), "tags": ["lora", "minigpt"],
        "pipeline_tag": "text-generation",
    }  # fmt: skip
    assert headings == [printable(name), "Use"]
    rows = dict(zip(cells[::2], cells[1::2], strict=True))
    assert rows["Base"] == printable(name).strip()
    assert rows["Adapter"] == f"rank 16, alpha 32, from {printable(name)}".strip()
    assert list(rows)[-1] == "Made with"


@pytest.mark.parametrize("alone", [False, True])
def test_card_without_adapter(base: BaseModel, alone: bool):
    front, headings, _ = parsed(model_card(base, "tiny", alone=alone))
    assert front == {
        "library_name": "transformers", "tags": ["minigpt"], "pipeline_tag": "text-generation",
    }  # fmt: skip
    assert headings == ["tiny", "Use"]
