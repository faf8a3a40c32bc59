"""A new run overwrites no file of a user in its directory."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from minigpt_cli.core.errors import UserError
from minigpt_cli.core.run_dir import RUN_FILES
from minigpt_cli.core.status import write_status
from minigpt_cli.recipe import Recipe
from minigpt_cli.train.loop import fit
from minigpt_cli.train.run_lock import run_lock
from minigpt_cli.train.start import resume_run, start_run

MakeRecipe = Callable[..., Recipe]


def content(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture
def finished(tmp_path: Path, make_recipe: MakeRecipe) -> Path:
    run = tmp_path / "run"
    fit(*start_run(make_recipe("train.steps=4"), run))
    return run


@pytest.mark.parametrize("name", RUN_FILES)
def test_files_of_a_user(tmp_path: Path, make_recipe: MakeRecipe, name: str):
    """In a directory with a file of one of our names, the run would overwrite it."""
    if name in ("incidents", "final", "checkpoints"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years of work")
    else:
        (tmp_path / name).write_text("{}")
    before = content(tmp_path)
    with pytest.raises(UserError, match=f"holds {name}, which the run would overwrite"):
        start_run(make_recipe(), tmp_path)
    assert content(tmp_path) == before


def test_a_run_whose_checkpoints_were_removed(finished: Path, make_recipe: MakeRecipe):
    shutil.rmtree(finished / "checkpoints")
    before = content(finished)
    with pytest.raises(UserError, match=r"holds .*, which the run would overwrite"):
        start_run(make_recipe("train.steps=4"), finished)
    assert content(finished) == before


def test_a_run_that_died_before_its_first_save(finished: Path, make_recipe: MakeRecipe):
    shutil.rmtree(finished / "checkpoints")
    shutil.rmtree(finished / "final")
    with pytest.raises(UserError, match=r"without a checkpoint and with another optimizer\.lr"):
        start_run(make_recipe("train.steps=4", "optimizer.lr=1e-4"), finished)
    run, state = start_run(make_recipe("train.steps=4"), finished)
    run.resources.close()
    assert state.step == 0


def test_a_run_that_trains_with_another_recipe(finished: Path, make_recipe: MakeRecipe):
    """It has no checkpoint yet, and must not be called dead."""
    shutil.rmtree(finished / "checkpoints")
    shutil.rmtree(finished / "final")
    with (
        run_lock(finished),
        pytest.raises(UserError, match="another process is training in it"),
    ):
        start_run(make_recipe("train.steps=4", "optimizer.lr=1e-4"), finished)


def test_a_run_that_died_while_data_was_prepared(tmp_path: Path, make_recipe: MakeRecipe):
    write_status(tmp_path, "running", None, None, "")
    (tmp_path / "metrics.jsonl").touch()
    start_run(make_recipe("train.steps=4"), tmp_path)[0].resources.close()
    assert json.loads((tmp_path / "status.json").read_text())["status"] != "running"


def test_files_of_a_user_in_final(finished: Path, capsys: pytest.CaptureFixture[str]):
    (finished / "final/thesis.txt").write_text("years of work")
    before = content(finished / "final")
    fit(*resume_run(finished, ["train.steps=6"], []))
    assert content(finished / "final") == before
    assert "final holds thesis.txt, which no export writes" in capsys.readouterr().err
    (finished / "final/thesis.txt").unlink()
    fit(*resume_run(finished, ["train.steps=8"], []))
    assert content(finished / "final") != before
