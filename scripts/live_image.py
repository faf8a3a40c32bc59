"""Draw the live view of a run into an image, docs/images/live.svg by default.

    python scripts/live_image.py runs/tiny --step 700

It shows what a terminal of 80 x 24 showed after that step: the last log lines and the view.
"""

import argparse
import io
import re
from pathlib import Path

from rich.console import Console

from minigpt_cli.core.run_dir import RECIPE, SAMPLES
from minigpt_cli.recipe import load_recipe
from minigpt_cli.report.live_layout import history_line, view_lines
from minigpt_cli.report.live_state import LiveState
from minigpt_cli.report.metrics import read

COLUMNS, LINES = 80, 24
IMAGE = Path(__file__).parent.parent / "docs/images/live.svg"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--step", type=int, required=True, help="a logged one")
    parser.add_argument("--out", type=Path, default=IMAGE)
    given = parser.parse_args()
    recipe = load_recipe(given.run / RECIPE)
    state = LiveState(recipe.total_steps, recipe.optimizer.clip_norm)
    metrics = [line for line in read(given.run) if line["step"] <= given.step]
    samples = [line for line in read(given.run, SAMPLES) if line["step"] <= given.step]
    state.restart(given.step, metrics, samples)
    steps = [line for line in metrics if "loss" in line]
    state.values = steps[-1]
    every = recipe.checkpoint.every_steps or 1
    saved = given.step - given.step % every
    state.note_save(saved)
    seconds = {line["step"]: line["seconds"] for line in steps}
    state.saved_at = (state.saved_at or 0.0) - (seconds[given.step] - seconds.get(saved, 0.0))
    state.began -= seconds[given.step]
    per_step = recipe.tokens_per_step / state.values["tokens_per_second"]
    state.seconds_left = (recipe.total_steps - given.step) * per_step

    terminal = Console(
        record=True,
        width=COLUMNS,
        force_terminal=True,
        color_system="truecolor",
        file=io.StringIO(),
    )
    view = view_lines(state, COLUMNS, LINES, ascii_only=False)
    for line in steps[-(LINES - len(view)) :]:
        terminal.print(history_line(line, COLUMNS), highlight=False)
    for text in view:
        terminal.print(text)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    image = terminal.export_svg(title="minigpt pretrain")
    # Without fonts from a server: the reader's own will do.
    given.out.write_text(re.sub(r"@font-face \{.*?\}\s*", "", image, flags=re.DOTALL))


if __name__ == "__main__":
    main()
