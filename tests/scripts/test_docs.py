"""The pages of docs/: what is made from the program is today's, and what make docs-test runs."""

from scripts import commands_page, run_docs
from tests.helpers.processes import ROOT

PAGE = """Text that says minigpt sample.

    minigpt tokenize a.txt -o d          # a comment
    step 1/2  loss 3

<!-- docs-test: setup
echo one
echo two
-->

```toml title="mine.toml"
[data]
```

<!-- docs-test: not run: it needs a GPU -->

    minigpt pretrain mine.toml

1. In a list:

    ```sh
    $ minigpt pretrain mine.toml > log
    ```
"""


def test_commands_page_is_that_of_today() -> None:
    page = commands_page.PAGE.read_text()
    assert commands_page.commands_page() == page, "run: python scripts/commands_page.py"


def test_steps_of_a_page() -> None:
    assert [(step.line, step.kind, step.text, step.about) for step in run_docs.steps(PAGE)] == [
        (3, "command", "minigpt tokenize a.txt -o d", ""),
        (6, "setup", "echo one\necho two", ""),
        (11, "file", "[data]\n", "mine.toml"),
        (17, "not run", "minigpt pretrain mine.toml", "it needs a GPU"),
        (22, "command", "minigpt pretrain mine.toml > log", ""),
    ]


def test_small_settings_stand_before_a_redirection() -> None:
    command = run_docs.small("minigpt resume runs/a 2> log")
    assert command == "minigpt resume runs/a --set train.steps=8 2> log"
    assert run_docs.small("minigpt sample runs/a | head") == "minigpt sample runs/a | head"


def test_every_page_is_on_the_site() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert "recipe.md" in pages
    assert {page for page in pages if page not in navigation} == set()
