"""``minigpt doctor``."""

from pathlib import Path
from typing import TYPE_CHECKING

from minigpt_cli.commands.options import Debug, Json, Version
from minigpt_cli.core.console import console, print_json, print_result, printable
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.signals import nothing_is_saved

if TYPE_CHECKING:
    from minigpt_cli.analysis.finding import Finding

EXAMPLE = "minigpt doctor"


def doctor_command(as_json: Json = False, version: Version = False, debug: Debug = False) -> None:
    """Show what this machine has and lacks for training.

    Versions, devices, the compiler, threads and the speed of the disk here; for each thing that is
    missing the command that mends it. Nothing is changed. Exit code 2 if training isn't possible.
    """
    nothing_is_saved()
    from minigpt_cli.analysis.doctor import diagnose

    with console().status("looking, and compiling a small function (up to 2 minutes) ..."):
        findings = diagnose(Path.cwd())
    broken = [each for each in findings if each.state == "broken"]
    if as_json:
        print_json({"ready": not broken, "findings": [_as_json(each) for each in findings]})
    else:
        print_result(_table(findings))
        print_result(_advice(findings))
    if broken:
        reasons = "; ".join(f"{each.what} {each.found}" for each in broken)
        commands = " and ".join(each.mend for each in broken)
        raise UserError(f"training is not possible here: {reasons}; mend it with {commands}")


def _as_json(finding: "Finding") -> dict[str, str]:
    return {
        "what": finding.what,
        "state": finding.state,
        "found": finding.found,
        "for": finding.purpose,
        "mend": finding.mend,
    }


def _table(findings: list["Finding"]) -> str:
    """Return a table that fits the terminal; its cells have several lines where they must."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colors = {"ok": "green", "lacks": "yellow", "broken": "red"}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("", "what", "found", "for"):
        table.add_column(name, overflow="fold")
    for each in findings:
        cells = [Text(printable(cell)) for cell in (each.what, each.found, each.purpose)]
        table.add_row(Text(each.state, style=colors[each.state]), *cells)
    writer = Console(highlight=False)
    with writer.capture() as captured:
        writer.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _advice(findings: list["Finding"]) -> str:
    """Return the commands that mend what is missing, each on a line of its own for copying."""
    mendable = [each for each in findings if each.state != "ok" and each.mend]
    if not mendable:
        is_whole = all(each.state == "ok" for each in findings)
        return f"\nNothing {'is missing' if is_whole else 'here can be mended by a command'}."
    lines = ["", "To mend, or to use what is missing:"]
    for each in mendable:
        lines += [printable(f"  {each.what} ({each.purpose})"), printable(f"    {each.mend}")]
    return "\n".join(lines)
