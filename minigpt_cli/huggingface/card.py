"""The model card, README.md: the architecture, the training, and how to load the model."""

import json
import re

import torch

from minigpt_cli import __version__
from minigpt_cli.checkpoint.state import RunState, read_state
from minigpt_cli.core.console import printable
from minigpt_cli.huggingface.adapter import LoadedAdapter
from minigpt_cli.huggingface.base_model import BaseModel
from minigpt_cli.model.cost import parameter_count
from minigpt_cli.recipe import Recipe, dump_recipe


def model_card(
    base: BaseModel, name: str, adapter: LoadedAdapter | None = None, alone: bool = False
) -> str:
    """Return the model card.

    Args:
        base: The model.
        name: The card's title.
        adapter: The adapter that was merged into the model, or is exported.
        alone: Whether the adapter is exported without the model.
    """
    c, recipe, checkpoint = base.config, base.recipe, base.directory
    rows = [
        ("Architecture", f"{c.family}, {c.num_hidden_layers} layers of width {c.hidden_size}"),
        ("Parameters", f"{parameter_count(c):,}"),
        ("Vocabulary", f"{c.vocab_size:,}"),
        ("Context", f"{c.max_position_embeddings:,} tokens"),
    ]
    if adapter is not None:
        shape = adapter.shape
        rows += [
            ("Base", base.name),
            ("Adapter", f"rank {shape.rank}, alpha {shape.alpha:g}, from {adapter.name}"),
        ]
        recipe, checkpoint = adapter.recipe, adapter.checkpoint or checkpoint
    elif recipe is not None and recipe.base is not None:
        rows.append(("Started from", recipe.base))
    if recipe is not None:
        rows += _training(recipe, read_state(checkpoint))
    rows.append(("Made with", f"minigpt {__version__}, torch {torch.__version__}"))
    table = "\n".join(f"| {what} | {_markdown(value)} |" for what, value in rows)
    is_alone = adapter is not None and alone
    card = _CARD.format(
        library="peft" if is_alone else "transformers",
        base="" if adapter is None else f"base_model: {_yaml(base.name)}\n",
        more_tags="" if adapter is None else "- lora\n",
        name=_markdown(name),
        table=table,
        load=_LOAD_ADAPTER if is_alone else _LOAD,
    )
    if recipe is not None:
        card += f"\n## Recipe\n\n```toml\n{dump_recipe(recipe)}```\n"
    return card


def _markdown(text: str) -> str:
    """Return a text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|&~])", r"\\\1", printable(text))


def _yaml(text: str) -> str:
    """Return a YAML value that is this text; a JSON string is one."""
    return json.dumps(printable(text), ensure_ascii=False)


def _training(recipe: Recipe, state: RunState) -> list[tuple[str, str]]:
    return [
        ("Trained on", _data(recipe)),
        ("Tokens", f"{state.tokens:,} in {state.step:,} steps"),
        *_losses(state),
    ]


def _data(recipe: Recipe) -> str:
    source = recipe.data.source
    if source is None:
        return recipe.data_path
    return " ".join([source.kind, *source.path])


def _losses(state: RunState) -> list[tuple[str, str]]:
    found = []
    if state.val_loss is not None:
        found.append(("Validation loss", f"{state.val_loss:.4f} at step {state.evaluated_step:,}"))
    if state.best_val_loss is not None:
        best = f"{state.best_val_loss:.4f} at step {state.best_step:,}"
        found.append(("Lowest validation loss", best))
    return found


_LOAD = 'model = AutoModelForCausalLM.from_pretrained("PATH")\n'
_LOAD_ADAPTER = """\
model = AutoModelForCausalLM.from_pretrained("BASE")
model = PeftModel.from_pretrained(model, "PATH")  # from peft import PeftModel
"""
_CARD = """\
---
library_name: {library}
pipeline_tag: text-generation
{base}tags:
{more_tags}- minigpt
---

# {name}

| | |
|---|---|
{table}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
{load}inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
"""
