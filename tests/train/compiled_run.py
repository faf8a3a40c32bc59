"""Train a compiled run with evaluations and prompts; print its compilations, as JSON.

compiled_run.py RECIPE OUT [SETTING...]
"""

import json
import sys
from pathlib import Path

import torch
from torch._dynamo.utils import counters

from minigpt_cli.recipe import load_recipe
from minigpt_cli.train.loop import fit
from minigpt_cli.train.start import start_run

recipe, out, *settings = sys.argv[1:]
run, state = start_run(load_recipe(recipe, settings), Path(out))
after_start = counters["stats"]["unique_graphs"]
fit(run, state)
found = {
    "after_start": after_start,
    "at_the_end": counters["stats"]["unique_graphs"],
    "deterministic": torch._inductor.config.deterministic,
    "optimize_ddp": torch._dynamo.config.optimize_ddp,
}
print(json.dumps(found))
