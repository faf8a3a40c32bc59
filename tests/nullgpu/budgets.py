"""The launches and the peak memory of small steps: measured now, and expected (budgets.json).

    .venv-nullgpu/bin/python -m tests.nullgpu.budgets

prints the table; ``make nullgpu-budgets`` renews it after a change that is meant to change it.
"""

import json
import tempfile
from pathlib import Path

from tests.nullgpu.build import build
from tests.nullgpu.process import script_output

BUDGETS = Path(__file__).parent / "budgets.json"
Table = dict[str, dict[str, int]]  # case -> the fields of StepCounts


def expected() -> Table:
    """Return the table of budgets.json."""
    found: Table = json.loads(BUDGETS.read_text())
    return found


def measure(library: Path) -> Table:
    """Count every case of steps.py."""
    found: Table = {}
    for which in ("eager", "compiled"):
        found |= json.loads(script_output(library, "steps.py", which))
    return found


def dump(table: Table) -> str:
    """Return the table as JSON, one case a line, so that a change shows in a diff."""
    lines = [f"  {json.dumps(name)}: {json.dumps(counts)}" for name, counts in table.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(dump(measure(build(Path(folder)))), end="")
