"""A few hundred cases of the fuzzer, always the same; ``make fuzz`` tries thousands."""

import subprocess
import sys

from tests.helpers.processes import ROOT


def test_mutated_files_and_command_lines_are_handled():
    command = [
        sys.executable,
        "-m",
        "tests.fuzz",
        "--cases",
        "300",
        "--minutes",
        "60",
        "--workers",
        "1",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
