import json
import os
import pty
import re
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

from minigpt_cli.checkpoint.manifest import read_checkpoint_manifest, write_checkpoint_manifest
from minigpt_cli.checkpoint.store import list_steps
from minigpt_cli.core.files import sha256_of
from minigpt_cli.model.precision import cpu_has_bf16
from tests.helpers.commands import finished, refused
from tests.helpers.models import saved_model
from tests.helpers.processes import command, environment, minigpt

ARGUMENTS = ("sample", "--prompt", "def ", "--max-new-tokens", "12", "--seed", "3")


def test_newest_run_and_seed(run: Path):
    folder = run.parent.parent
    streamed = finished(*ARGUMENTS, cwd=folder)
    result = json.loads(finished(*ARGUMENTS, "--json", "--num-samples", "3", cwd=folder))
    assert result["prompt"] == "def "
    assert len(result["completions"]) == 3
    assert streamed == "def " + result["completions"][0] + "\n"
    three = finished(*ARGUMENTS, "--num-samples", "3", cwd=folder)
    for completion in result["completions"]:
        assert "def " + completion in three


def test_device_and_dtype(run: Path):
    folder = run.parent.parent
    default = finished(*ARGUMENTS, "--device", "cpu", cwd=folder)
    expected = "bf16" if cpu_has_bf16() else "fp32"
    assert finished(*ARGUMENTS, "--device", "cpu", "--dtype", expected, cwd=folder) == default
    for dtype in ("bf16", "fp16"):
        assert finished(*ARGUMENTS, "--dtype", dtype, cwd=folder).startswith("def ")


def test_prompt_longer_than_the_context(run: Path):
    def sample(prompt: str) -> tuple[dict, str]:
        done = minigpt("sample", run, "--prompt", prompt, "--max-new-tokens", "2", "--json")
        return json.loads(done.stdout), done.stderr

    result, errors = sample("x = 1\n" * 100)
    tokens = re.search(r"the prompt has (\d+) tokens; the model sees only the last 32", errors)
    assert int(tokens[1]) > 100
    assert result["prompt_tokens_seen"] == 32
    result, errors = sample("x")
    assert "the prompt has" not in errors
    assert result["prompt_tokens_seen"] == 1


def test_any_minigpt_json_marks_our_models(run: Path, tmp_path: Path):
    """Its content doesn't matter for sampling."""
    copy = tmp_path / "final"
    shutil.copytree(run / "final", copy)
    expected = finished("sample", copy, "--prompt", "def ", "--greedy", "--max-new-tokens", "4")
    (copy / "minigpt.json").write_text("[]")
    found = finished("sample", copy, "--prompt", "def ", "--greedy", "--max-new-tokens", "4")
    assert found == expected


def test_hostile_model(license_dataset: Path, tmp_path: Path):
    """Nothing but one line on standard error: no panic of Rust, no traceback."""
    _, model = saved_model("llama", tmp_path / "model", license_dataset)
    (model / "chat_template.jinja").write_text("{% set n = 10**10 %}{{ 'a' * n }}")
    refused(2, "template: takes more than 2 GB of memory", "sample", model, "--chat")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    split |= {"pattern": {"Regex": "(a+)+$"}}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer | {"pre_tokenizer": split}))
    prompt = "a" * 50 + "!"
    refused(2, "tokenizer.json: Onig: Regex search error", "sample", model, "--prompt", prompt)
    (tmp_path / "a.txt").write_text(prompt)
    refused(2, "tokenizer.json: Onig", "eval", model, "--text", tmp_path / "a.txt")
    replaced = {"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 1000}
    parts = {"type": "Sequence", "decoders": [tokenizer["decoder"], *[replaced] * 4]}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer | {"decoder": parts}))
    refused(2, "tokenizer.json: takes more than", "sample", model, "--prompt", "a")


def test_run_whose_recipe_asks_for_more(run: Path, tmp_path: Path):
    """A received run may be made so that all its checksums are right."""
    shutil.copytree(run, tmp_path / "run")
    _, checkpoint = list_steps(tmp_path / "run")[-1]
    text = (checkpoint / "recipe.toml").read_text()
    many = re.sub(r"num_hidden_layers = \d+", "num_hidden_layers = 10000", text)
    (checkpoint / "recipe.toml").write_text(many)
    manifest = read_checkpoint_manifest(checkpoint)
    entry = {"bytes": len(many), "sha256": sha256_of(checkpoint / "recipe.toml")}
    forged = replace(manifest, files=manifest.files | {"recipe.toml": entry})
    write_checkpoint_manifest(checkpoint, forged)
    for command_ in ("sample", "export", "eval", "resume"):
        out = [tmp_path / "out"] if command_ == "export" else []
        message = "num_hidden_layers is 10,000, but the weights have"
        refused(4, message, command_, checkpoint, *out)


def test_no_run(tmp_path: Path):
    refused(2, "runs/ holds no trained run", "sample", cwd=tmp_path)


def test_a_completion_on_a_terminal_and_in_a_pipe(run: Path):
    prompt = "a\tb\nc\x1b[2J\x1b]0;title\x07"
    arguments = ("sample", run, "--prompt", prompt, "--max-new-tokens", "1", "--num-samples", "2")
    assert minigpt(*arguments).stdout.count(prompt) == 2
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command(*arguments), stdout=theirs, stderr=subprocess.DEVNULL, env=environment()
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 10_000):
                shown += part
        except OSError:  # the terminal's other side is closed
            pass
    os.close(ours)
    assert process.returncode == 0
    text = shown.decode().replace("\r\n", "\n")
    assert text.count("a\tb\nc" + r"\x1b[2J\x1b]0;title\x07") == 2
    assert "\x1b" not in text


def test_prompts_from_a_file_and_from_standard_input(run: Path, tmp_path: Path):
    file = tmp_path / "prompt.txt"
    file.write_text("def \n\n")
    arguments = ("--max-new-tokens", "4", "--greedy", "--json")
    expected = json.loads(finished("sample", run, "--prompt", "def \n\n", *arguments))
    assert json.loads(finished("sample", run, "--prompt-file", file, *arguments)) == expected
    done = subprocess.run(
        command("sample", run, "--prompt", "-", *arguments), stdin=file.open(), env=environment(),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == expected
    refused(2, "--prompt-file can't be combined", "sample", "--prompt", "a", "--prompt-file", file)
    file.write_bytes(b"\xff")
    refused(2, "prompt.txt: can't be read: byte 0 is not UTF-8", "sample", "--prompt-file", file)
    refused(2, "--top-p: must lie in (0, 1], not 2.0", "sample", "--top-p", "2")


def test_ctrl_c_ends_the_line(run: Path):
    arguments = ("sample", run, "--prompt", "def ", "--max-new-tokens", "1000000")
    with subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        start = process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        rest, errors = process.stdout.read(), process.stderr.read()
    assert process.returncode == 130
    assert (start + rest).startswith(b"def ")
    assert rest.endswith(b"\n")
    assert errors.splitlines()[-1] == b"minigpt: stopped by SIGINT"
