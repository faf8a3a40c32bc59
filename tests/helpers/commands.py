"""A finished command, and one that is refused."""

from pathlib import Path

from tests.helpers.processes import minigpt


def finished(*arguments: object, cwd: Path | None = None) -> str:
    """Run a command that must succeed; return its standard output."""
    done = minigpt(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(code: int, part: str, *arguments: object, cwd: Path | None = None) -> None:
    """Run a command that must fail with this exit code and one line that contains ``part``."""
    done = minigpt(*arguments, cwd=cwd)
    lines = [line for line in done.stderr.splitlines() if line.startswith("minigpt: ")]
    assert done.returncode == code, done.stderr
    assert len(lines) == 1, done.stderr
    assert part in lines[0]
    assert done.stderr.splitlines()[-1] == lines[0]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
