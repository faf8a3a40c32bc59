"""The command line as a user meets it: real processes, messages, exit codes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import refused
from tests.helpers.processes import ROOT, SHARED, command, environment, minigpt
from tests.helpers.recipes import TINY
from tests.helpers.runs import tensors


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """A finished run under runs/tiny of a working directory."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "tiny.toml").write_text(TINY.format(data=dataset))
    done = minigpt("pretrain", "tiny.toml", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["run"] == "runs/tiny"
    assert result["step"] == 12
    return folder / "runs/tiny"


def test_what_a_run_leaves_behind(run: Path):
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "recipe.toml", "metrics.jsonl", "tokenizer.json", "environment.json", "status.json",
        "checkpoints",
    }  # fmt: skip
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    assert "lr = 0.003  # recipe" in (run / "recipe.toml").read_text()
    assert json.loads((run / "environment.json").read_text())["threads"] >= 1
    newest = run / "checkpoints/step-00000012"
    assert sorted(path.name for path in newest.iterdir()) == [
        "manifest.json", "recipe.toml",
        "shard-00001-model-00001-of-00002.safetensors",
        "shard-00001-model-00002-of-00002.safetensors",
        "state.json", "tokenizer.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "part", "arguments"),
    [
        (2, "no/recipe.toml: no such recipe", ("pretrain", "no/recipe.toml")),
        (2, "did you mean steps?", ("pretrain", "{recipe}", "--set", "train.stepz=3")),
        (2, "is not a token dataset", ("pretrain", "{recipe}", "--set", "data.path=nowhere")),
        (2, "has no sequence of train.sequence_length", ("pretrain", "{recipe}", "--set",
                                       "train.sequence_length=1000000")),
        (2, "already holds a run at step 12", ("pretrain", "{recipe}", "--out", "{run}")),
        (2, "can't be written to", ("pretrain", "{recipe}", "--out", "{recipe}/x")),
        (2, "not a multiple of micro_batch_size", ("pretrain", "{recipe}", "--set",
                                                   "train.micro_batch_size=3")),
        (2, "not a multiple of num_attention_heads", ("pretrain", "{recipe}", "--set",
                                                      "model.hidden_size=33")),
        (2, "no such run or checkpoint", ("resume", "nowhere")),
        (2, "add --allow-change train.seed", ("resume", "{run}", "--set", "train.seed=1")),
        (2, "temperature", ("sample", "{run}", "--temperature", "-1")),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    run: Path, tmp_path: Path, recipe_file: Path, code: int, part: str, arguments: tuple[str, ...]
):
    words = {"recipe": recipe_file, "run": run}
    refused(code, part, *(each.format(**words) for each in arguments), cwd=tmp_path)


def test_damaged_dataset_and_other_tokenizer(
    run: Path, tmp_path: Path, dataset: Path, recipe_file: Path
):
    damaged = tmp_path / "damaged"
    shutil.copytree(dataset, damaged)
    shard = damaged / "train-00000.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    refused(4, "train-00000.npy: its content doesn't match its sha256",
            "pretrain", recipe_file, "--set", f"data.path={damaged}", cwd=tmp_path)  # fmt: skip
    shard.unlink()
    refused(4, "train-00000.npy: is missing", "eval", run, "--data", damaged)
    other = tmp_path / "other"
    made = minigpt("tokenize", ROOT / "LICENSE", "--out", other, "--vocab-size", 300)
    assert made.returncode == 0, made.stderr
    refused(2, "was made with another tokenizer", "eval", run, "--data", other)


def test_no_run_is_started_in_a_checkpoint(run: Path, recipe_file: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    newest = copy / "checkpoints/step-00000012"
    for place in (newest, copy / "checkpoints", copy / "checkpoints/step-00000099"):
        refused(2, "belongs to a run's checkpoints", "pretrain", recipe_file, "--out", place)
    refused(2, "belongs to a run's checkpoints", "resume", copy / "checkpoints", "--or-start",
            recipe_file)  # fmt: skip
    done = minigpt("resume", newest, "--or-start", recipe_file)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stderr
    assert minigpt("verify", copy).returncode == 0


def test_a_damaged_checkpoint_is_refused_by_name(run: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").iterdir():
        (path / "state.json").unlink()
    refused(4, "no valid checkpoint", "resume", copy)
    status = json.loads((copy / "status.json").read_text())  # for scripts under torchrun
    assert (status["status"], status["exit_code"]) == ("failed", 4)
    refused(4, "state.json: missing", "resume", copy / "checkpoints/step-00000012")
    refused(4, "no valid checkpoint", "sample", copy, "--prompt", "x")


@pytest.mark.parametrize("damage", ["missing", "torn"])
def test_newest_valid_checkpoint_is_used(run: Path, tmp_path: Path, damage: str):
    """Whichever of its files is damaged: this one is looked at first."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    older, newest = sorted((copy / "checkpoints").iterdir())[-2:]
    if damage == "missing":
        (newest / "recipe.toml").unlink()
    else:
        os.truncate(newest / "recipe.toml", 40)
    done = minigpt("sample", copy, "--prompt", "x", "--max-new-tokens", 2, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["checkpoint"] == str(older)
    assert f"{newest.name} skipped" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_full_disk(run: Path, tmp_path: Path, recipe_file: Path):
    saved = tensors(run / "checkpoints/step-00000012").values()
    size = sum(tensor.numel() * tensor.element_size() for tensor in saved)
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "none", place]).returncode:
        pytest.skip("no permission to mount")
    try:
        done = minigpt("pretrain", recipe_file, "--out", place / "run")
        assert done.returncode == 2, done.stderr
        room = r"takes (0\.\d\d) MB, and 0\.\d\d MB are free; older checkpoints are untouched"
        told = re.search(room, done.stderr.splitlines()[-1])
        assert told is not None
        assert float(told[1]) == pytest.approx(size / 1e6, abs=0.006)
        assert "Traceback" not in done.stderr
        assert "training goes on" in done.stderr  # the saves before the last could wait
        assert minigpt("verify", place / "run").returncode == 0
        subprocess.run(["mount", "-o", "remount,size=50m", place], check=True)
        assert minigpt("resume", place / "run").returncode == 0
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_gone(run: Path, tmp_path: Path, unbuffered: str):
    """``minigpt ... | head``: that is no error, and hides none."""
    damaged = tmp_path / "damaged"
    shutil.copytree(run / "checkpoints/step-00000012", damaged)
    (damaged / "tokenizer.json").write_text("{}")
    for arguments, code in (
        (("verify", run), 0),
        (("verify", damaged, "--json"), 4),
        (("sample", run, "--prompt", "x"), 0),
        (("-h",), 0),
    ):
        process = subprocess.Popen(
            command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment() | {"PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait() == code
        assert errors.count("minigpt: ") == (code > 0)
        assert "BrokenPipe" not in errors


def test_no_room_for_the_output(run: Path):
    """A disk that is full, or no standard output at all."""
    for shell, code in (('exec "$@" >/dev/full', 2), ('exec "$@" >&-', 0)):
        for extra in ((), ("--json",)):
            done = subprocess.run(
                ["sh", "-c", shell, "sh", *command("verify", run, *extra)],
                stderr=subprocess.PIPE, text=True, env=environment(),
            )  # fmt: skip
            assert done.returncode == code
            assert len(done.stderr.splitlines()) == (code > 0), done.stderr


def test_training_goes_on_when_nobody_reads_its_log(recipe_file: Path):
    """``minigpt pretrain ... 2>&1 | tee log``, and tee is killed."""
    process = subprocess.Popen(
        command("pretrain", recipe_file, "--set", "log.every_steps=1"), cwd=recipe_file.parent,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(),
    )  # fmt: skip
    while not process.stdout.readline().startswith("step 1/"):
        assert process.poll() is None
    process.stdout.close()
    assert process.wait() == 0
    status = json.loads((recipe_file.parent / "runs/tiny/status.json").read_text())
    assert (status["status"], status["step"]) == ("finished", 12)
    assert (recipe_file.parent / "runs/tiny/final/config.json").exists()


def test_usage_errors():
    for arguments, said in {
        ("pretrain",): "Missing argument 'RECIPE' (see minigpt pretrain --help)",
        ("tokeniz",): "No such command 'tokeniz'. Did you mean 'tokenize'? (see minigpt --help)",
        ("sample", "--promt", "x"): "No such option: --promt",
        ("sample", "--prompt"): "Option '--prompt' requires an argument (see minigpt",
        ("export", "a", "b", "--dtype", "int8"): "'int8' is not one of 'fp32', 'bf16', 'fp16'",
        ("pretrain", "x.toml", "--nproc", "0"): "Invalid value for '--nproc'",
    }.items():
        done = minigpt(*arguments)
        assert done.returncode == 2
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("minigpt: ")
        assert said in line


def test_incomplete_rank_variables(recipe_file: Path):
    done = subprocess.run(
        [sys.executable, "-m", "minigpt_cli", "pretrain", recipe_file],
        env=environment() | {"WORLD_SIZE": "2", "RANK": "0"}, capture_output=True, text=True,
        cwd=recipe_file.parent,
    )  # fmt: skip
    assert done.returncode == 2
    assert "MASTER_ADDR, MASTER_PORT not set" in done.stderr


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
def test_tinyshakespeare_with_gpt2s_tokenizer(tmp_path: Path, recipe_file: Path):
    """One document and a vocabulary made elsewhere: the tail is for validation."""
    made = minigpt("tokenize", SHARED / "data/tinyshakespeare.txt", "--out", tmp_path / "data",
                   "--tokenizer", SHARED / "data/gpt2", "--val-fraction", 0.1,
                   "--json")  # fmt: skip
    assert made.returncode == 0, made.stderr
    splits = json.loads(made.stdout)["splits"]
    assert splits["train"]["bytes"] + splits["val"]["bytes"] == 1_115_394
    assert 0.09 < splits["val"]["bytes"] / 1_115_394 < 0.11
    trained = minigpt("pretrain", recipe_file, "--set", f"data.path={tmp_path / 'data'}",
                      "--set", "train.steps=3", "--out", tmp_path / "run", "--json")  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["val_loss"] == pytest.approx(10.8, abs=0.1)  # ln 50257


def test_the_users_own_recipe_is_never_overwritten(tmp_path: Path, dataset: Path):
    (tmp_path / "mine").mkdir()
    recipe = tmp_path / "mine/recipe.toml"
    recipe.write_text(TINY.format(data=dataset) + "# my notes\n")
    refused(2, "would be overwritten", "pretrain", recipe, "--out", tmp_path / "mine")
    assert recipe.read_text().endswith("# my notes\n")


def test_a_run_that_diverges_exits_with_3(tmp_path: Path, dataset: Path):
    (tmp_path / "tiny.toml").write_text(TINY.format(data=dataset))
    refused(3, "training diverged", "pretrain", "tiny.toml", "--set", "optimizer.lr=1e25",
            "--set", "schedule.warmup_steps=0", cwd=tmp_path)  # fmt: skip
    assert json.loads((tmp_path / "runs/tiny/status.json").read_text())["status"] == "diverged"
    assert not list((tmp_path / "runs/tiny").glob("checkpoints/step-*"))
    refused(3, "validation loss", "pretrain", "tiny.toml", "--set", "optimizer.lr=3e38",
            "--set", "schedule.warmup_steps=0", "--set", "train.steps=1",
            "--set", "schedule.name=constant", "--out", "second", cwd=tmp_path)  # fmt: skip
    assert not list((tmp_path / "second").glob("checkpoints/step-*"))
    refused(2, "expected a finite number above 0, got inf", "pretrain", "tiny.toml",
            "--set", "optimizer.lr=inf", cwd=tmp_path)  # fmt: skip


def test_too_little_memory_is_one_line(tmp_path: Path, dataset: Path):
    (tmp_path / "tiny.toml").write_text(TINY.format(data=dataset))
    sizes = ("--set", "train.global_batch_size=65536", "--set", "train.micro_batch_size=65536")
    done = subprocess.run(
        ["bash", "-c", 'ulimit -v 5000000; exec "$@"', "bash", *command("pretrain", "tiny.toml"),
         *sizes],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    size = r"[\d.,]+ [GM]B"
    start = f"minigpt: out of memory: {size} were asked for, {size} are free; in training, try"
    assert re.match(f"{start} in this order: a smaller train.micro_batch_size", last), done.stderr


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", None])
def test_the_users_allocator_settings_come_first(name: str | None):
    code = (
        "import os; from minigpt_cli.__main__ import _set_environment; _set_environment(); "
        "print({k: v for k, v in os.environ.items() if k.endswith('ALLOC_CONF')})"
    )
    given = {} if name is None else {name: "max_split_size_mb:64"}
    others = {key: value for key, value in environment().items() if "ALLOC_CONF" not in key}
    found = subprocess.run(
        [sys.executable, "-c", code], env=others | given, capture_output=True, text=True, check=True
    ).stdout  # fmt: skip
    assert found.strip() == str(given or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


@pytest.mark.parametrize("columns", ["0", "-5", "", "wide", "9" * 100])
def test_a_width_that_is_none_counts_as_80(columns: str, tmp_path: Path):
    def show(columns: str) -> str:
        return subprocess.run(
            command("sample", "--help"), env=environment() | {"COLUMNS": columns},
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip

    assert show(columns) == show("80")


def test_names_that_are_no_text(dataset: Path, tmp_path: Path):
    name = os.fsdecode(b"na\xffme")
    (tmp_path / name).symlink_to(dataset)
    for encoding in ("utf-8", "ascii"):
        done = subprocess.run(
            command("verify", name), env=environment() | {"PYTHONIOENCODING": encoding},
            cwd=tmp_path, capture_output=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.startswith(rb"na\udcffme: valid")


def test_several_problems_are_a_list(recipe_file: Path):
    done = minigpt("pretrain", recipe_file, "--set", "train.stepz=1", "--set", "optimizer.lr=-1")
    assert done.stderr.splitlines() == [
        f"minigpt: {recipe_file}: 2 problems",
        "  --set train.stepz: unknown; did you mean steps?",
        "  --set optimizer.lr: expected a number above 0, got -1.0",
    ]


def test_an_empty_value_is_refused(recipe_file: Path):
    """``-o "$OUT"`` without the variable would mean the working directory."""
    for arguments in (("-o", ""), ("--out=",), ("--set", "")):
        refused(2, f"{arguments[0].rstrip('=')} is empty: is a variable of the shell not set?",
                "pretrain", recipe_file, *arguments, cwd=recipe_file.parent)  # fmt: skip
    refused(2, "minigpt: an argument is empty", "verify", "runs", "", cwd=recipe_file.parent)
    assert not (recipe_file.parent / "recipe.toml").exists()


def test_lines_of_a_log_stay_lines(run: Path):
    done = minigpt("resume", run)
    assert "\\x0a" not in done.stderr
    assert any(line.startswith("12 steps of 8 x 32 tokens") for line in done.stderr.splitlines())
