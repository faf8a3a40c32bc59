"""Run every command of README.md and docs/, with small settings; `make docs-test`.

    python scripts/run_docs.py [PAGE...]

Each page is one shell session in a directory of its own, which holds recipes/, scripts/ and the
dataset data/tiny. A command is a line of a code block that begins with a name of ``PROGRAMS``. A
block of TOML with a title (```toml title="mine.toml") is written to that file. Comments in a page,
which a reader doesn't see, steer it:

    <!-- docs-test: setup        runs these lines of shell first
    cp -r "$SCENE/runs" .
    -->
    <!-- docs-test: not run: it needs two machines -->      about the next block
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROGRAMS = (
    "curl", "gunzip", "hf", "iconv", "make", "minigpt", "pip", "python", "sbatch", "srun",
    "tensorboard", "torchrun", "trackio", "vllm", "wandb",
)  # fmt: skip
NEVER_RUN = {
    "hf": "it downloads",
    "make": "its targets are run by themselves",
    "pip": "it installs",
    "sbatch": "it needs a cluster",
    "srun": "it needs a cluster",
    "tensorboard": "it serves until it is stopped",
    "trackio": "it serves until it is stopped",
    "vllm": "it needs a GPU",
    "wandb": "it needs an account",
}
SECONDS = 300  # that a command may take

# Added to commands, so that they end in seconds. Later settings win over earlier ones.
TRAINING = [
    "train.steps=6", "train.global_batch_size=4", "train.sequence_length=64", "log.every_steps=2",
    "schedule.warmup_steps=2", "checkpoint.every_steps=4", "eval.windows=4",
]  # fmt: skip
MODEL = ["model.hidden_size=32", "model.num_hidden_layers=1", "model.num_attention_heads=2"]
SHAPED = ("pretrain", "lr-find")  # these take MODEL too


@dataclass(frozen=True)
class Step:
    """One thing to do for a page.

    Attributes:
        line: in the page.
        kind: "setup", "file", "command" or "not run".
        text: shell, a file's content, or a command.
        about: the file's name, or why a command isn't run.
    """

    line: int
    kind: str
    text: str
    about: str = ""


def steps(page: str) -> Iterator[Step]:
    """Yield what a page asks for, in its order."""
    lines = page.split("\n")
    number, reason = 0, None
    while number < len(lines):
        line, start = lines[number], number + 1
        number += 1
        if match := re.match(r"<!-- docs-test: not run: (.*) -->", line):
            reason = match[1]
        elif line.startswith("<!-- docs-test: setup"):
            inside = lines[number : lines.index("-->", number)]
            number += len(inside) + 1
            yield Step(start, "setup", "\n".join(inside))
        elif fence := re.match(r"( *)(```+)(\w*)(?: title=\"(.*)\")?", line):
            end = next(n for n in range(number, len(lines)) if lines[n].strip() == fence[2])
            inside = [each.removeprefix(fence[1]) for each in lines[number:end]]
            number = end + 1
            if fence[4]:
                yield Step(start, "file", "\n".join(inside) + "\n", fence[4])
            elif fence[3] in ("", "sh", "console"):
                yield from _commands(inside, start + 1, reason)
            reason = None
        elif line.startswith("    "):
            end = number
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            yield from _commands([each[4:] for each in lines[number - 1 : end]], start, reason)
            number, reason = end, None


def _commands(block: list[str], first: int, reason: str | None) -> Iterator[Step]:
    whole = ""
    for number, line in enumerate(block, first):
        whole += line.removeprefix("$ ")
        if whole.endswith("\\"):
            whole = whole[:-1]
            continue
        command, whole = whole, ""
        if command.split(" ")[0] in PROGRAMS:
            why = reason or NEVER_RUN.get(command.split(" ")[0], "")
            kind = "not run" if why else "command"
            yield Step(number, kind, re.sub(r"\s+#\s.*", "", command), why)


def small(command: str) -> str:
    """Return a command with small settings."""
    match = re.match(r"minigpt (pretrain|finetune-lora|resume|lr-find)\b", command)
    if match is None or " -h" in command:
        return command
    settings = ["train.steps=8"] if match[1] == "resume" else TRAINING
    if match[1] in SHAPED:
        settings = settings + MODEL
    added = "".join(f" --set {setting}" for setting in settings)
    if match[1] == "lr-find":
        added += " --steps 12 --budget 4"
    head, *tail = re.split(r"(?=\s+(?:\||&&|;|>|2>)\s?)", command, maxsplit=1)
    return head + added + "".join(tail)


def run_page(page: Path, scene: Path, folder: Path) -> tuple[int, list[str]]:
    """Run a page's commands; return how many were run, and what failed."""
    _prepare(folder)
    shutil.copytree(scene / "data", folder / "data")
    count, failed = 0, []
    for step in steps(page.read_text()):
        place = f"{page.relative_to(ROOT)}:{step.line}"
        if step.kind == "file":
            (folder / step.about).write_text(step.text)
        elif step.kind == "not run":
            print(f"{place}: not run ({step.about}): {step.text}")
        else:
            shell = step.text if step.kind == "setup" else small(step.text)
            began = time.monotonic()
            code, output = _run(shell, folder, scene)
            print(f"{place}: {time.monotonic() - began:.1f} s: {step.text.splitlines()[0]}")
            count += step.kind == "command"
            if code:
                failed.append(f"{place}: exit code {code}: {shell}\n{output[-3000:]}")
    return count, failed


def _run(shell: str, folder: Path, scene: Path) -> tuple[int, str]:
    programs = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SCENE": str(scene),
        "ROOT": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(scene / "cache"),  # the user's stays as it is
    }
    try:
        ended = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", shell],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        return 124, str(error.stdout)
    return ended.returncode, ended.stdout


def _prepare(folder: Path) -> None:
    folder.mkdir()
    for name in ("recipes", "scripts"):
        (folder / name).symlink_to(ROOT / name)


def main(pages: list[Path]) -> int:
    failed, count = [], 0
    with tempfile.TemporaryDirectory(prefix="minigpt-docs-") as name:
        scene = Path(name) / "scene"
        _prepare(scene)
        command = small("minigpt pretrain recipes/tiny.toml")
        code, output = _run(command, scene, scene)
        if code:
            print(output)
            return 1
        for page in pages:
            more, wrong = run_page(page.resolve(), scene, Path(name) / page.stem)
            count += more
            failed += wrong
    for each in failed:
        print(f"\n{each}")
    print(f"{count} commands of {len(pages)} pages were run, {len(failed)} failed")
    return int(bool(failed))


if __name__ == "__main__":
    given = [Path(name) for name in sys.argv[1:]]
    sys.exit(main(given or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]))
