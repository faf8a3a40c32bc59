"""What ``--help`` says, and the names that scripts rely on."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from minigpt_cli import __version__
from minigpt_cli.cli import app
from tests.helpers.processes import ROOT, fork, minigpt

COMMON = {"--version", "--debug"}
TRAINING = COMMON | {"--set", "--nproc", "--nproc-per-node", "--json"}
TRIALS = {"--dry-run", "--overfit-one-batch"}
# Scripts use these names: none may go without a deprecation. A new one is added here.
SURFACE = {
    "tokenize": COMMON | {
        "SOURCE", "--out", "-o", "--vocab-size", "--train-vocab", "--tokenizer", "--text-field",
        "--split", "--config", "--strict", "--no-strict", "--format", "--chat-template",
        "--val-fraction", "--shard-tokens", "--workers", "--json",
    },
    "pretrain": TRAINING | TRIALS | {"RECIPE", "--out", "-o"},
    "plan": COMMON | {
        "RECIPE", "--set", "--gpus", "--gpu-memory", "--gpu", "--measure", "--mfu", "--json",
    },
    "resume": TRAINING | {"RUN", "--allow-change", "--or-start"},
    "finetune-lora": TRAINING | TRIALS | {"RECIPE", "--out", "-o"},
    "lr-find": TRAINING | {"RECIPE", "--from", "--to", "--steps", "--budget", "--out", "-o"},
    "eval": COMMON | {
        "MODEL", "--adapter", "--data", "--split", "--text", "--tasks", "--tasks-dir",
        "--trust-tasks", "--limit", "--num-fewshot", "--chat", "--batch-size", "--device",
        "--dtype", "--json",
    },
    "sample": COMMON | {
        "MODEL", "--adapter", "--prompt", "--prompt-file", "--chat", "--max-new-tokens",
        "--num-samples", "--temperature", "--top-k", "--top-p", "--min-p", "--repetition-penalty",
        "--greedy", "--stop", "--seed", "--device", "--dtype", "--json",
    },
    "export": COMMON | {"MODEL", "OUT", "--dtype", "--adapter", "--adapter-only", "--json"},
    "runs": COMMON | {"[DIR]", "--json"},
    "verify": COMMON | {"PATH", "--json"},
    "doctor": COMMON | {"--json"},
    "recipes": COMMON | {"NAME", "--json"},
    "report": COMMON | {"RUN", "--out", "-o", "--png", "--json"},
}  # fmt: skip
TYPES = re.compile(r"<\w+>|INTEGER|\bFLOAT\b|list\[")


def names(command: object) -> set[str]:
    """The names of a command's options and arguments."""
    return {
        name
        for param in command.params  # type: ignore[attr-defined]
        for name in (
            [param.metavar]
            if param.param_type_name == "argument"
            else [*param.opts, *param.secondary_opts]
        )
    }


def test_surface():
    group = typer.main.get_command(app)
    commands = group.commands  # type: ignore[attr-defined]
    assert {name: names(command) for name, command in commands.items()} == SURFACE
    assert names(group) == COMMON | {"--install-completion", "--show-completion"}


@pytest.mark.parametrize("name", SURFACE)
def test_help_of_a_command(name: str):
    short, long = (minigpt(name, option) for option in ("-h", "--help"))
    assert short.returncode == 0
    assert short.stdout == long.stdout
    text = " ".join(long.stdout.split())
    assert f"Usage: minigpt {name} [OPTIONS]" in text
    assert f"Example: minigpt {name} " in text
    assert "Exit codes: 0 done; 1 " in text
    assert "75 stopped by a signal with everything saved: go on with minigpt resume " in text
    assert not TYPES.search(text)
    shown = {option for option in SURFACE[name] if option != "--train-vocab"}
    assert not [option for option in shown if option not in text]


def test_help_shows_choices():
    for name in ("eval", "sample"):
        assert "<auto|fp32|bf16|fp16>" in minigpt(name, "-h").stdout
    assert "<text|instructions>" in minigpt("tokenize", "-h").stdout


def test_help_fits_80_columns(tmp_path: Path):
    output = tmp_path / "output"
    assert fork(tmp_path / "log", "--help", output=output, COLUMNS="80").wait() == 0
    lines = output.read_text().splitlines()
    assert max(map(len, lines)) <= 80
    for name in SURFACE:
        (line,) = [line for line in lines if line.startswith(f"│ {name} ")]
        assert line.strip("│ ").endswith(".")  # the whole sentence


def test_help_without_arguments():
    done = minigpt()
    assert done.returncode == 2
    assert "finetune-lora" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("--version",),
        ("--version", "pretrain", "{recipe}"),
        ("pretrain", "--version"),
        ("pretrain", "{recipe}", "--version"),
    ],
)
def test_version(recipe_file: Path, tmp_path: Path, arguments: tuple[str, ...]):
    done = minigpt(*(each.format(recipe=recipe_file) for each in arguments), cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout == f"minigpt {__version__}\n"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("place", [0, 2])
def test_debug(place: int):
    arguments = ["pretrain", "nowhere.toml"]
    arguments.insert(place, "--debug")
    done = minigpt(*arguments)
    assert done.returncode == 2
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("words", "expected"), [("minigpt fine", "finetune-lora"), ("minigpt eval --tex", "--text")]
)
def test_completion(words: str, expected: str):
    variables = {
        "_MINIGPT_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-m", "minigpt_cli"], env=os.environ | variables, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.stdout.split() == [expected]
