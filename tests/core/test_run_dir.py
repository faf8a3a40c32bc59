"""Which run a path means."""

from pathlib import Path

import pytest

from minigpt_cli.core.run_dir import checkpoint_path, run_of


def test_the_run_of_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = tmp_path / "run"
    checkpoint = checkpoint_path(run, 5)
    checkpoint.mkdir(parents=True)
    (copy := tmp_path / "run/checkpoints/copy").mkdir()
    (copy / "manifest.json").touch()
    for path in (run, run / "checkpoints", checkpoint, copy):
        assert run_of(path) == run
    monkeypatch.chdir(run / "checkpoints")
    for name in ("..", ".", checkpoint.name):
        assert run_of(Path(name)) == run
    assert run_of(tmp_path / "not-there") == tmp_path / "not-there"
