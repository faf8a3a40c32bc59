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
from tests.helpers.runs import rewind

MakeRecipe = Callable[..., Recipe]
SETTINGS = ("train.steps=4", "checkpoint.every_steps=2")


def content(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture
def finished(tmp_path: Path, make_recipe: MakeRecipe) -> Path:
    run = tmp_path / "run"
    fit(*start_run(make_recipe(*SETTINGS), run))
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
        start_run(make_recipe(*SETTINGS), finished)
    assert content(finished) == before


def test_a_run_that_died_before_its_first_save(finished: Path, make_recipe: MakeRecipe):
    shutil.rmtree(finished / "checkpoints")
    shutil.rmtree(finished / "final")
    with pytest.raises(UserError, match=r"without a checkpoint and with another optimizer\.lr"):
        start_run(make_recipe(*SETTINGS, "optimizer.lr=1e-4"), finished)
    run, state = start_run(make_recipe(*SETTINGS), finished)
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
        start_run(make_recipe(*SETTINGS, "optimizer.lr=1e-4"), finished)


def test_a_run_that_died_while_data_was_prepared(tmp_path: Path, make_recipe: MakeRecipe):
    write_status(tmp_path, "running", None, None, "")
    (tmp_path / "metrics.jsonl").touch()
    start_run(make_recipe(*SETTINGS), tmp_path)[0].resources.close()
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


PLANTED = [f".{name}.tmp" for name in RUN_FILES if "." in name]
PLANTED += [".status.json", *(name for name in RUN_FILES if "." in name and name != "recipe.toml")]


def test_planted_links_lead_nowhere(finished: Path, tmp_path: Path):
    """A received run must not make resume write outside it."""
    outside = tmp_path / "outside"
    outside.mkdir()
    rewind(finished, 2)
    for name in PLANTED:
        target = outside / name.strip(".")
        target.write_text("mine")
        (finished / name).unlink(missing_ok=True)
        (finished / name).symlink_to(target)
    (finished / "checkpoints" / ".writing-step-00000004").symlink_to(outside)
    (finished / "checkpoints" / ".deleting-step-00000001").symlink_to(outside)
    (finished / "final").rename(outside / "final")
    (finished / "final").symlink_to(outside / "final")
    before = content(outside)
    run, state = resume_run(finished, [], [])
    assert state.step == 2
    fit(run, state)
    assert content(outside) == before


@pytest.mark.parametrize("name", ["checkpoints", "incidents", ".lock"])
def test_linked_directories_are_refused(finished: Path, tmp_path: Path, name: str):
    outside = tmp_path / "outside"
    if name == ".lock":
        (finished / name).unlink()
    elif name == "checkpoints":
        (finished / name).rename(outside)
    else:
        outside.mkdir()
    (finished / name).symlink_to(outside)
    with pytest.raises(UserError, match=f"{name} is a link|can't be written to: .*symbolic links"):
        resume_run(finished, [], [])
    assert name != ".lock" or not outside.exists()


def test_a_failed_start_leaves_nothing(tmp_path: Path, make_recipe: MakeRecipe):
    with pytest.raises(UserError, match="too few"):
        start_run(make_recipe("train.sequence_length=1000000"), tmp_path / "runs" / "new")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="too few"):
        start_run(make_recipe("train.sequence_length=1000000"), tmp_path / "mine")
    assert (tmp_path / "mine").is_dir()
