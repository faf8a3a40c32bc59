"""A run directory with everything that a report shows, written by hand, and a page's data."""

import json
import math
from pathlib import Path
from typing import Any

from minigpt_cli.recipe import dump_recipe, parse_recipe
from minigpt_cli.report.page import render_page
from minigpt_cli.report.run_contents import read_run, runs_by_name
from tests.helpers.recipes import TINY


def write_run(
    run: Path, steps: int = 100, settings: tuple[str, ...] = (), lr: float = 3e-3
) -> Path:
    """A run of so many logged steps, an evaluation every tenth, one spike and one rollback."""
    (run / "incidents").mkdir(parents=True)
    text = TINY.format(data="data/tiny").replace("steps = 12", f"steps = {2 * steps}")
    recipe = parse_recipe(text, [f"optimizer.lr={lr}", *settings], name=run.name)
    (run / "recipe.toml").write_text(dump_recipe(recipe))
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        row = {
            "step": step, "tokens": 256 * step, "loss": 2 + 6 * math.exp(-step / 30), "lr": lr,
            "grad_norm": 0.5 + (step % 10) / 10, "tokens_per_second": 5000.0 + step,
            "mfu": 0.3, "seconds": 0.5 * step, "memory_bytes": 2_000_000_000, "time": 1e9 + step,
        }  # fmt: skip
        rows.append(row)
        if step % 10 == 0:
            loss = row["loss"] + 0.1
            rows.append({
                "step": step, "tokens": 256 * step, "val_loss": loss, "val_perplexity":
                math.exp(loss), "val_bits_per_byte": loss / 3, "time": 1e9 + step,
            })  # fmt: skip
    write_lines(run / "metrics.jsonl", rows)
    write_lines(run / "samples.jsonl", [
        {"step": step, "prompt": "To be", "completion": f" or not {step}", "time": 1e9 + step}
        for step in range(10, steps + 1, 10)
    ])  # fmt: skip
    spike = {
        "kind": "spike", "time": "2026-11-24T18:51:58+0000", "ranks": [0], "bad_steps": 2,
        "step": 41, "loss": 9.5, "grad_norm": 3.0, "loss_limit": 4.25, "grad_norm_limit": 5.0,
        "windows": [{"window": 3, "shard": "train-00000.npy", "offset": 96, "text": "a b c"}],
        "others": [{"step": 43}],
    }  # fmt: skip
    rollback = {"kind": "rollback", "time": "2026-11-24T18:52:58+0000", "step": 44, "to_step": 40}
    (run / "incidents/step-00000041-spike.json").write_text(json.dumps(spike))
    (run / "incidents/step-00000044-rollback.json").write_text(json.dumps(rollback))
    status = {"status": "finished", "exit_code": 0, "step": steps, "message": "", "pid": 1}
    (run / "status.json").write_text(json.dumps(status))
    (run / "environment.json").write_text('{"torch": "2.13.0", "device": "a machine"}')
    return run


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def page_of(*runs: Path) -> str:
    return render_page([read_run(path, name) for name, path in runs_by_name([*runs]).items()])


def data_of(page: str) -> list[dict[str, Any]]:
    """The data of a page's charts, by run."""
    text = page.partition('id="data">')[2].partition("</script>")[0]
    found: list[dict[str, Any]] = json.loads(text)["runs"]
    return found
