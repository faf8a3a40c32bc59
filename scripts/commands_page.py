"""Write docs/commands.md: every command with its arguments and options.

    python scripts/commands_page.py

It is made from the command line itself; a test compares the page with it.
"""

import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from typer.main import get_command

from minigpt_cli.cli import app
from minigpt_cli.commands.options import EXIT_CODES

PAGE = Path(__file__).parent.parent / "docs/commands.md"
EVERYWHERE = ("version", "debug", "help")


def commands_page() -> str:
    """Return the page of today's commands."""
    group: Any = get_command(app)
    parts = [
        "# Commands\n",
        "Made from the command line by `python scripts/commands_page.py`. Every command also takes "
        "`--debug` (show the traceback of an error), `--version` and `-h`. `minigpt "
        "--install-completion` makes the shell complete commands and options.\n",
        f"{EXIT_CODES}\n",
    ]
    for name, command in group.commands.items():
        parts.append(f"## minigpt {name}\n")
        parts.append(_text(command.help) + "\n")
        example = _text(command.epilog.split("\n\n")[0]).removeprefix("Example: ")
        # Not run by `make docs-test`: an example names files that a reader may have.
        parts.append(f"```text\n{example}\n```\n")
        types = get_type_hints(command.callback)
        shown = [each for each in command.params if each.name not in EVERYWHERE]
        rows = [_row(each, types[each.name]) for each in shown if not each.hidden]
        if rows:
            parts.append("| argument or option | meaning |\n|---|---|\n" + "".join(rows))
    return "\n".join(parts)


def _row(param: Any, value_type: Any) -> str:
    help_text = _text(param.help or "").replace("|", "\\|").replace("\n", " ")
    value = param.metavar
    choices = [each for each in (value_type, *get_args(value_type)) if get_origin(each) is Literal]
    if not value and choices:
        value = "\\|".join(get_args(choices[0]))
    if param.param_type_name == "argument":
        return f"| `{value}` | {help_text} |\n"
    names = ", ".join(f"`{name}`" for name in [*param.opts, *param.secondary_opts])
    if not (param.is_flag or param.default in (None, (), []) or "default" in help_text):
        help_text += f" Default: {param.default}."
    return f"| {names}{f' `{value}`' if value else ''} | {help_text} |\n"


def _text(help_text: str) -> str:
    """Return a help text without rich's marks, each paragraph on one line."""
    plain = re.sub(r"(?<!\\)\[/?[a-z ]+\]", "", help_text).replace("\\[", "[")
    return "\n\n".join(" ".join(part.split()) for part in plain.split("\n\n")).strip()


if __name__ == "__main__":
    PAGE.write_text(commands_page())
