"""A hundred cases of the fuzzer, always the same; ``make fuzz`` tries thousands."""

import signal
import subprocess
import sys

import pytest

from tests.fuzz.run import Ended, outcome
from tests.helpers.processes import ROOT


@pytest.mark.slow
def test_mutated_files_and_command_lines_are_handled():
    options = ["--cases", "100", "--minutes", "60", "--workers", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *options], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("code", "errors", "limit", "expected"),
    [
        (0, "", None, "handled"),
        (2, "warning: old\nminigpt: a.toml: 2 problems\n  one\n  two\n", None, "handled"),
        (4, "minigpt: data: is damaged\n", None, "handled"),
        (1, "minigpt: the connection is lost\n", None, "traceback"),
        (2, "Traceback (most recent call last):\nminigpt: no\n", None, "traceback"),
        (-signal.SIGSEGV, "", None, "traceback"),
        (-signal.SIGKILL, "", "memory", "memory"),
        (2, "", None, "unclear"),
        (2, "minigpt: one\nminigpt: two\n", None, "unclear"),
        (2, "minigpt: one\ntwo\n", None, "unclear"),
        (2, "minigpt: \x1b[2J\n", None, "unclear"),
        (2, f"minigpt: {'x' * 2000}\n", None, "unclear"),
    ],
)
def test_outcomes(code: int, errors: str, limit: str | None, expected: str):
    assert outcome(Ended(code, limit, 0.1, "", errors))[0] == expected
