"""Try many faults and print a table of those survived: ``python -m tests.faults --kills 200``.

Ends with 1 if one wasn't. The same seed gives the same faults at the same random moments, as far as
the machine keeps time.
"""

import argparse
import math
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from tests.faults.scene import CannotTry, Scene, scene
from tests.faults.trials import Trial, long, short
from tests.helpers.processes import heed_signals


@dataclass
class Row:
    """What became of the faults of one kind."""

    tried: int = 0
    survived: int = 0
    seconds: float = 0.0
    hit: Counter[str] = field(default_factory=Counter)
    left_out: list[str] = field(default_factory=list)


def try_all(
    trials: Iterable[Trial], where: Scene, console: Console, minutes: float = math.inf
) -> dict[str, Row]:
    """Do them all, also after one that wasn't survived; begin none after so many minutes."""
    rows: dict[str, Row] = {}
    deadline = time.monotonic() + 60 * minutes
    for trial in trials:
        if time.monotonic() > deadline:
            console.print(f"stopped after {minutes} minutes")
            break
        row = rows.setdefault(trial.kind, Row())
        began = time.monotonic()
        try:
            done = trial.do(where)
        except CannotTry as reason:
            row.left_out.append(f"{trial.name}: {reason}")
        except Exception:
            row.tried += 1
            console.print(f"NOT SURVIVED: {trial.kind}: {trial.name}", style="red", markup=False)
            console.print(traceback.format_exc(limit=-4), markup=False)
        else:
            count = done.total() if isinstance(done, Counter) else done or 1
            row.tried += count
            row.survived += count
            row.hit += done if isinstance(done, Counter) else Counter()
            console.print(
                f"{trial.kind}: {trial.name}: {count} survived, {time.monotonic() - began:.1f} s",
                markup=False,
            )
        row.seconds += time.monotonic() - began
    return rows


def table(rows: dict[str, Row]) -> Table:
    made = Table(title="Faults")
    for heading, justify in (("kind", "left"), ("tried", "right"), ("survived", "right"),
                             ("seconds", "right"), ("what they hit", "left")):  # fmt: skip
        made.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for kind, row in rows.items():
        remarks = [f"{what} {count}" for what, count in row.hit.most_common()]
        remarks += [f"not tried: {what}" for what in row.left_out]
        numbers = (str(row.tried), str(row.survived), f"{row.seconds:.0f}")
        made.add_row(kind, *numbers, ", ".join(remarks))
    made.add_section()
    total = [sum(getattr(row, name) for row in rows.values()) for name in ("tried", "survived")]
    seconds = sum(row.seconds for row in rows.values())
    made.add_row("all", *map(str, total), f"{seconds:.0f}", "")
    return made


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs of single processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="trials whose kind or name holds this text")
    parser.add_argument("--short", action="store_true", help="the few that pytest does")
    parser.add_argument(
        "--minutes", type=float, help="try them in random order, and begin none after so long"
    )
    given = parser.parse_args(arguments)
    heed_signals()
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"seed {given.seed}, {given.kills} kills")
    trials = short(given.seed) if given.short else long(given.seed, given.kills)
    chosen = [trial for trial in trials if given.only in f"{trial.kind}: {trial.name}"]
    if given.minutes is not None:
        random.Random(given.seed).shuffle(chosen)
    with scene() as where:
        rows = try_all(chosen, where, console, given.minutes or math.inf)
    console.print(table(rows))
    return int(any(row.survived < row.tried for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
