"""N steps straight equal k steps, a resume, and N - k more: bit for bit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from minigpt_cli.checkpoint import store
from minigpt_cli.checkpoint.manifest import read_checkpoint_manifest
from minigpt_cli.core.errors import Stopped, UserError
from minigpt_cli.model.gpt import GPT
from minigpt_cli.recipe import Recipe, dump_recipe, parse_recipe
from minigpt_cli.train.loop import fit
from minigpt_cli.train.start import resume_run, start_run
from tests.helpers.events import in_micro_batches, stop
from tests.helpers.file_limit import limit_files
from tests.helpers.recipes import TINY
from tests.helpers.runs import assert_same_run, curve, rewind

MakeRecipe = Callable[..., Recipe]


@pytest.mark.parametrize(
    "overrides",
    [
        ("precision.dtype=fp32",),
        ("precision.dtype=bf16", "optimizer.name=muon"),
        ("precision.dtype=fp16", "schedule.name=wsd"),
        ("precision.dtype=fp32", "model.dropout=0.1", "model.family=qwen3"),
        ("precision.dtype=bf16", "model.family=gpt2", "model.num_key_value_heads=4",
         "train.activation_checkpointing=true", "model.dropout=0.1"),
        ("precision.dtype=fp32", "guard.spike_sigma=1", "guard.spike_window=8",
         "guard.rollback_after=100"),
    ],
    ids=["fp32", "bf16-muon", "fp16", "dropout", "gpt2-recompute", "spikes"],
)  # fmt: skip
def test_resume_is_bit_exact(
    tmp_path: Path, make_recipe: MakeRecipe, small_dataset: Path, overrides: tuple[str, ...]
):
    recipe = make_recipe(*overrides, data=small_dataset)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run, state = start_run(recipe, straight)
    windows = run.batches.sequences.num_sequences
    assert 4 * 8 < windows * 1.5 < 12 * 8  # an epoch ends between the first resume and the end
    fit(run, state)
    shutil.copytree(straight, resumed)
    rewind(resumed, 4)
    run, state = resume_run(resumed, [], [])
    assert state.step == 4
    fit(run, state)
    assert_same_run(straight, resumed, 12)
    rewind(resumed, 8)
    fit(*resume_run(resumed, [], []))
    assert_same_run(straight, resumed, 12)
    fit(*resume_run(resumed, [], []))  # finished: nothing happens
    assert_same_run(straight, resumed, 12)


def test_an_old_checkpoint_starts_a_new_branch(tmp_path: Path, make_recipe: MakeRecipe):
    run_dir = tmp_path / "run"
    fit(*start_run(make_recipe(), run_dir))
    fit(*resume_run(run_dir / "checkpoints/step-00000004", ["optimizer.lr=1e-3"], []))
    steps = [step for step, _ in store.list_steps(run_dir)]
    assert steps == [4, 8, 12]
    aside = sorted(path.name for path in (run_dir / "checkpoints").glob("*.aside-*"))
    assert aside == ["step-00000008.aside-1", "step-00000012.aside-1"]
    assert [line["step"] for line in curve(run_dir) if "loss" in line] == list(range(1, 13))
    assert curve(run_dir)[-2]["lr"] < 1e-3
    assert "lr = 0.001  # command line" in (run_dir / "recipe.toml").read_text()


def test_changes_are_refused_unless_named(
    tmp_path: Path, make_recipe: MakeRecipe, small_dataset: Path, capsys: pytest.CaptureFixture[str]
):
    run_dir = tmp_path / "run"
    fit(*start_run(make_recipe("train.steps=4"), run_dir))
    for change in ("train.seed=2", "model.dropout=0.2", "train.global_batch_size=4"):
        key = change.partition("=")[0]
        with pytest.raises(UserError, match=f"--allow-change {key}"):
            resume_run(run_dir, [change], [])
    with pytest.raises(UserError, match="--allow-change data"):
        resume_run(run_dir, [f"data.path={small_dataset}"], [])
    capsys.readouterr()
    run, state = resume_run(run_dir, ["train.seed=2", "train.steps=6"], ["train.seed"])
    assert "changed: train.seed = 2 (was 1337)" in capsys.readouterr().err
    fit(run, state)
    assert state.step == 6
    for change in ("model.hidden_size=64", "optimizer.name=muon"):
        with pytest.raises(UserError, match="can't change within a run"):
            resume_run(run_dir, [change], [change.partition("=")[0]])
    with pytest.raises(UserError, match="another model, optimizer or precision"):
        resume_run(run_dir, ["precision.dtype=fp64"], [])
    with pytest.raises(UserError, match="no such setting"):
        resume_run(run_dir, [], ["train.sead"])
    with pytest.raises(UserError, match="is at step 6 already, but the recipe has only 5 steps"):
        resume_run(run_dir, ["train.steps=5"], [])


def test_resume_walks_back_past_damaged_checkpoints(
    tmp_path: Path, make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
):
    straight, run_dir = tmp_path / "straight", tmp_path / "run"
    fit(*start_run(make_recipe(), straight))
    shutil.copytree(straight, run_dir)
    newest = run_dir / "checkpoints/step-00000012"
    weights = next(newest.glob("*00001-of-00002.safetensors"))
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    (run_dir / "checkpoints/step-00000008/state.json").unlink()
    fit(*resume_run(run_dir, [], []))
    errors = capsys.readouterr().err
    assert "step-00000012 skipped" in errors
    assert "sha256 differs" in errors
    assert "step-00000008 skipped" in errors
    assert "from step 4 of 12" in errors
    assert_same_run(straight, run_dir, 12)


def test_an_existing_run_is_not_started_over(tmp_path: Path, make_recipe: MakeRecipe):
    fit(*start_run(make_recipe("train.steps=4"), tmp_path))
    with pytest.raises(UserError, match="already holds a run at step 4"):
        start_run(make_recipe(), tmp_path)
    fit(*resume_run(tmp_path, ["train.steps=5"], []))  # the refusal left no lock behind


def test_two_runs_in_one_directory_are_refused(tmp_path: Path, make_recipe: MakeRecipe):
    run, _ = start_run(make_recipe(), tmp_path)
    with pytest.raises(UserError, match="another process is training in it"):
        start_run(make_recipe(), tmp_path)
    run.resources.close()


def test_a_run_goes_on_wherever_it_lies(tmp_path: Path, dataset: Path):
    """[data] path left out means data/<recipe's name>, also when the run has another name."""
    text = TINY.format(data=dataset).replace(f'path = "{dataset}"', "")
    source = ["data.source.kind=python-stdlib", "data.tokenizer.train_vocab=300"]
    recipe = parse_recipe(text, source, name="mine")
    assert recipe.data.path == "data/mine"
    again = parse_recipe(dump_recipe(recipe), [], name="another")
    assert again.data.path == "data/mine"


def test_a_resumes_changes_stay_before_its_first_save(tmp_path: Path, make_recipe: MakeRecipe):
    fit(*start_run(make_recipe("train.steps=4"), tmp_path))
    run, _ = resume_run(tmp_path, ["train.steps=8"], [])
    run.resources.close()  # as if killed before it saved
    run, state = resume_run(tmp_path, [], [])
    assert run.recipe.train.steps == 8
    fit(run, state)
    assert state.step == 8


def test_a_refused_resume_touches_nothing(tmp_path: Path, make_recipe: MakeRecipe):
    fit(*start_run(make_recipe(), tmp_path))
    files = ("metrics.jsonl", "recipe.toml")
    before = [(tmp_path / name).read_bytes() for name in files if (tmp_path / name).exists()]
    with pytest.raises(UserError):
        resume_run(tmp_path / "checkpoints/step-00000004", ["data.path=nowhere"], [])
    after = [(tmp_path / name).read_bytes() for name in files if (tmp_path / name).exists()]
    assert after == before
    assert [step for step, _ in store.list_steps(tmp_path)] == [4, 8, 12]


def test_a_stopped_evaluation_is_done_once_on_resume(tmp_path: Path, make_recipe: MakeRecipe):
    """SIGTERM in the evaluation of step 4: the resume evaluates it, and saves that it did."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    fit(*start_run(make_recipe(), straight))
    run, state = start_run(make_recipe(), stopped)

    def stop_evaluation(model: GPT, _: object) -> None:
        if not model.training:
            stop()

    run.context.model.register_forward_pre_hook(stop_evaluation)
    with pytest.raises(Stopped, match="at step 4 of 12, everything is saved"):
        fit(run, state)
    assert read_checkpoint_manifest(stopped / "checkpoints/step-00000004").val_loss is None
    fit(*resume_run(stopped, [], []))
    assert_same_run(straight, stopped, 12)
    lines = [line for line in curve(stopped) if line["step"] == 4 and "val_loss" in line]
    assert len(lines) == 1
    first = lines[0]["val_loss"]
    assert read_checkpoint_manifest(stopped / "checkpoints/step-00000004").val_loss == first


def test_a_signal_after_a_failed_save_saves_again(tmp_path: Path, make_recipe: MakeRecipe):
    """The save of step 4 fails; in step 5 there is room again, and SIGTERM comes."""
    settings = ("eval.every_steps=100", "checkpoint.asynchronous=false")
    run, state = start_run(make_recipe(*settings), tmp_path)

    def make_room_and_stop() -> None:
        limit_files(None)
        stop()

    in_micro_batches(run, {2 * 3: lambda: limit_files(50_000), 2 * 4: make_room_and_stop})
    with pytest.raises(Stopped, match="at step 5 of 12, everything is saved"):
        fit(run, state)
    assert [step for step, _ in store.list_steps(tmp_path)] == [5]


def test_another_machine_is_warned_about(
    tmp_path: Path, make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
):
    fit(*start_run(make_recipe("train.steps=4"), tmp_path))
    file = tmp_path / "environment.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"threads": 99}))
    run, _ = resume_run(tmp_path, [], [])
    run.resources.close()
    assert "threads changed from 99 to " in capsys.readouterr().err


def test_a_checkpoint_elsewhere_is_refused(tmp_path: Path, make_recipe: MakeRecipe):
    fit(*start_run(make_recipe("train.steps=4"), tmp_path / "run"))
    copy = tmp_path / "a/b/step-00000004"
    shutil.copytree(tmp_path / "run/checkpoints/step-00000004", copy)
    with pytest.raises(UserError, match="put it under RUN/checkpoints/"):
        resume_run(copy, [], [])
    assert not (tmp_path / "a/.lock").exists()
