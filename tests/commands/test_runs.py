"""``minigpt runs`` as a process, on a real run: running, killed, resumed."""

import json
import time
from pathlib import Path

from tests.helpers.commands import finished, refused
from tests.helpers.processes import fork, minigpt
from tests.helpers.recipes import TINY
from tests.helpers.runs import steps_saved


def test_a_run_that_is_killed_and_resumed(tmp_path: Path, dataset: Path):
    (tmp_path / "tiny.toml").write_text(TINY.format(data=dataset))
    long = ("--set", "train.steps=100000")
    process = fork(tmp_path / "log", "pretrain", "tiny.toml", *long)
    while len(steps_saved(tmp_path / "runs/tiny")) < 2:
        assert process.code is None, process.tail
        time.sleep(0.01)

    def listed() -> dict[str, object]:
        (found,) = json.loads(finished("runs", "--json", cwd=tmp_path))["runs"]
        assert found["path"] == "runs/tiny"
        return found

    with process.stopped():
        found = listed()
        assert (found["status"], found["total_steps"]) == ("running", 100_000)
    process.kill()
    process.wait()
    assert listed()["status"] == "killed"
    table = finished("runs", cwd=tmp_path).splitlines()
    assert [line.split()[:2] for line in table] == [["run", "status"], ["runs/tiny", "killed"]]
    saved = steps_saved(tmp_path / "runs/tiny")[-1]
    finished("resume", "runs/tiny", "--set", f"train.steps={saved + 4}", cwd=tmp_path)
    found = listed()
    assert (found["status"], found["step"]) == ("finished", saved + 4)
    assert found["tokens"] == (saved + 4) * 8 * 32
    assert found["checkpoint_step"] == saved + 4
    assert float(str(found["val_loss"])) >= float(str(found["best_val_loss"])) > 0


def test_nothing_there(tmp_path: Path):
    done = minigpt("runs", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "runs: no runs\n")
    assert json.loads(finished("runs", "--json", cwd=tmp_path)) == {"directory": "runs", "runs": []}
    refused(2, "nowhere: no such directory", "runs", "nowhere", cwd=tmp_path)
