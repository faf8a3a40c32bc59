"""Commands on a run that trains meanwhile, and deletes its old checkpoints."""

import json
from pathlib import Path

from tests.helpers.commands import finished
from tests.helpers.processes import fork, minigpt
from tests.helpers.recipes import TINY
from tests.helpers.waiting import wait_until


def test_models_of_a_run_that_saves_all_the_time(tmp_path: Path, dataset: Path):
    (tmp_path / "tiny.toml").write_text(TINY.format(data=dataset))
    settings = {
        "train.steps": 100_000, "checkpoint.every_steps": 1, "checkpoint.keep_last": 1,
        "checkpoint.keep_best": "false", "eval.every_steps": 1_000_000, "schedule.warmup_steps": 1,
    }  # fmt: skip
    overrides = [text for key, value in settings.items() for text in ("--set", f"{key}={value}")]
    run = tmp_path / "run"
    training = fork(tmp_path / "log", "pretrain", tmp_path / "tiny.toml", "--out", run, *overrides)
    try:
        wait_until(lambda: any((run / "checkpoints").glob("step-*")))
        steps = set()
        for number in range(6):
            out = minigpt("sample", run, "--prompt", "def ", "--max-new-tokens", "2", "--json")
            assert out.returncode == 0, out.stderr
            assert "skipped" not in out.stderr
            steps.add(json.loads(out.stdout)["checkpoint"])
            finished("export", run, tmp_path / f"export-{number}")
            finished("verify", run)
        assert len(steps) == 6
        assert training.code is None
    finally:
        training.kill_all()
