"""One of two ranks; rank 1 alone gets a signal in the middle of a step.

``python rank_that_is_stopped.py RECIPE FOLDER`` prints [name, step, evaluated step, signal] of each
run, as JSON.
"""

import json
import sys
from pathlib import Path

from minigpt_cli.cli import _leave
from minigpt_cli.commands.launching import join_ranks
from minigpt_cli.core.errors import Stopped
from minigpt_cli.recipe import load_recipe
from minigpt_cli.train.loop import fit
from minigpt_cli.train.start import start_run
from tests.helpers.events import in_micro_batches, stop

SELDOM = ["eval.every_steps=100", "checkpoint.every_steps=100"]
RUNS = {  # name -> (the step in which the signal comes, overrides)
    "in a step": (3, SELDOM),
    "in the last step": (12, SELDOM),
    "before an evaluation": (4, ["checkpoint.every_steps=100"]),
    "before a save": (4, ["eval.every_steps=100"]),
}

if __name__ == "__main__":
    join_ranks()
    for name, (step, overrides) in RUNS.items():
        recipe = load_recipe(Path(sys.argv[1]), overrides, name="tiny")
        run, state = start_run(recipe, Path(sys.argv[2]) / name)
        if run.world.rank == 1:
            in_micro_batches(run, {step - 1: stop})
        signum = 0
        try:
            fit(run, state)
        except Stopped as error:
            signum = error.signum
        print(json.dumps([name, state.step, state.evaluated_step, signum]), flush=True)
    _leave(0)
