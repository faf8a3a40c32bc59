"""A name that is no model: what it is, and what to do."""

from pathlib import Path

import pytest

from tests.helpers.commands import refused


@pytest.mark.parametrize(
    ("part", "arguments"),
    [
        ("gpt2: no such directory. A model is a directory: a run, a checkpoint, or a Hugging Face "
         "model, downloaded with: hf download ORG/NAME", ("eval", "gpt2", "--text", "{run}")),
        ("runs/tyni: no such directory. A model is", ("sample", "runs/tyni")),
        ("{dataset}: is a token dataset", ("sample", "{dataset}")),
        ("{dataset}: is a token dataset", ("resume", "{dataset}")),
        ("is a Hugging Face directory, neither a run", ("resume", "{run}/final")),
        ("recipe.toml: is a file", ("sample", "{run}/recipe.toml")),
        ("neither a run directory nor a checkpoint: it holds no recipe.toml", ("eval", "empty")),
        ("incidents: neither a run directory nor", ("sample", "{run}/incidents")),
    ],
)  # fmt: skip
def test_what_it_is(run: Path, dataset: Path, part: str, arguments: tuple[str, ...]):
    folder = run.parent.parent
    (folder / "empty").mkdir(exist_ok=True)
    (run / "incidents").mkdir(exist_ok=True)
    names = {"run": run, "dataset": dataset}
    given = [each.format(**names) for each in arguments]
    refused(2, part.format(**names), *given, cwd=folder)
