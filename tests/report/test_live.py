"""What a person sees on a terminal: a real pty, and an emulator that knows nothing of our code."""

import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minigpt_cli.core.run_dir import METRICS
from tests.helpers.processes import Process, fork
from tests.helpers.terminal import Terminal

BAR = re.compile(r"step [\d,]+/[\d,]+ ━*─* [ \d]{3}%  \d+:\d\d  left [\d:?]+$")
BRAILLE = re.compile("[\u2801-\u28ff]")
STEP = re.compile(r"step (\d+)  loss (\d+\.\d{4})  lr ")
ENDLESS = ("--set", "train.steps=100000", "--set", "eval.every_steps=20", "--set",
           "log.every_steps=10", "--set", "checkpoint.every_steps=20", "--set",
           "checkpoint.keep_last=1", "--set", 'eval.prompts=["def f("]')  # fmt: skip


@pytest.fixture
def terminal() -> Iterator[Callable[[int, int], Terminal]]:
    """``terminal(80, 24)`` -> a terminal of 80 columns and 24 lines."""
    opened: list[Terminal] = []

    def make(columns: int, lines: int) -> Terminal:
        opened.append(Terminal(columns, lines))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Start minigpt on a terminal; it is killed at the test's end."""
    started: list[Process] = []

    def run(screen: Terminal, *arguments: object, **variables: str) -> Process:
        options = {"TERM": "xterm-256color", "COLUMNS": "", "LANG": "C.UTF-8"} | variables
        started.append(fork(screen.path, *arguments, cwd=tmp_path, **options))
        return started[-1]

    yield run
    for each in started:
        each.kill()


def is_panel(lines: list[str]) -> bool:
    """Whether all parts of the view are there."""
    text = "\n".join(lines)
    parts = ("── loss", "● validation", "┤", "lr", "grad norm", "of logged steps", "tok/s",
             "peak memory", "checkpoint", "| ")  # fmt: skip
    return (
        all(part in text for part in parts)
        and BRAILLE.search(text) is not None
        and any(BAR.match(line) for line in lines)
    )


def check_screen(lines: list[str], columns: int, rows: int) -> None:
    """One view at the bottom, complete and without remains of another; the log above it."""
    assert len(lines) == rows
    while not lines[-1]:
        lines = lines[:-1]  # a terminal that has grown
    (bar,) = (index for index, line in enumerate(lines) if "━" in line or " left " in line)
    assert len(lines[bar]) == columns - 1
    (title,) = (index for index, line in enumerate(lines) if line.startswith("── loss"))
    curve = lines[title + 1 : bar]
    assert all("│" in line or "┤" in line for line in curve[:-2])
    assert curve[-2].lstrip().startswith("└┬")
    assert len(lines) - bar <= 5
    assert all(len(line) < columns for line in lines[title:])
    for line in lines[: title - 1]:
        assert not BRAILLE.search(line), line
        assert "┤" not in line, line


def logged(run: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_view_through_resizes_and_its_end(
    terminal: Callable[[int, int], Terminal], begin: Callable[..., Process], recipe_file: Path,
    tmp_path: Path,
):  # fmt: skip
    screen = terminal(80, 24)
    process = begin(screen, "pretrain", recipe_file, "--out", "run", *ENDLESS)
    screen.wait_for(is_panel)
    screen.wait_for(lambda lines: STEP.match(lines[0]))  # the log has scrolled
    with process.stopped():
        screen.read()
        check_screen(screen.shown, 80, 24)
        (bar,) = (index for index, line in enumerate(screen.shown) if BAR.match(line))
        assert "lr " in screen.shown[bar + 1]

        screen.resize(200, 50)
    wide = screen.wait_for(lambda lines: is_panel(lines) and any(len(x) > 190 for x in lines))
    with process.stopped():
        screen.read()
        check_screen(screen.shown, 200, 50)
        assert any("┤" in line and "tok/s" in line for line in wide)  # numbers beside the curve

        screen.resize(60, 20)  # its lines wrap
    screen.wait_for(lambda lines: any(BAR.match(x) and len(x) == 59 for x in lines))
    with process.stopped():
        screen.read()
        check_screen(screen.shown, 60, 20)
        screen.resize(40, 8)
    screen.wait_for(lambda lines: any(" left " in line and len(line) <= 39 for line in lines))
    with process.stopped():
        screen.resize(80, 24)
    screen.wait_for(lambda lines: is_panel(lines) and any(len(x) == 79 for x in lines))

    screen.press(b"\x03")
    assert screen.wait(process) == 130
    last = [line for line in screen.shown if line]
    assert "".join(last[-2:]).startswith("minigpt: stopped by SIGINT at step ")
    assert not BRAILLE.search("".join(last))
    assert not any("left" in line or "┤" in line for line in last)
    assert pyte_is_usual(screen)


def pyte_is_usual(screen: Terminal) -> bool:
    """Whether the cursor is visible, lines wrap, and no style is left."""
    cursor = screen.screen.cursor
    return not cursor.hidden and cursor.attrs.fg == "default" and 7 << 5 in screen.screen.mode


def test_history_stays_above_and_a_resume_draws_the_whole_curve(
    terminal: Callable[[int, int], Terminal], begin: Callable[..., Process], recipe_file: Path,
    tmp_path: Path,
):  # fmt: skip
    screen = terminal(80, 24)
    settings = ("--set", "train.steps=40")
    assert screen.wait(begin(screen, "pretrain", recipe_file, "--out", "run", *settings)) == 0
    history = [STEP.match(line) for line in screen.scrolled + screen.shown]
    shown = [(int(m[1]), m[2]) for m in history if m]
    assert shown == [(line["step"], f"{line['loss']:.4f}") for line in logged(tmp_path / "run")]
    assert len(shown) == 40
    text = "\n".join(screen.scrolled + screen.shown)
    assert not BRAILLE.search(text)
    assert " left " not in text
    assert "finished at step 40" in text

    screen = terminal(80, 24)
    process = begin(screen, "resume", "run", *ENDLESS)
    lines = screen.wait_for(lambda lines: BRAILLE.search("\n".join(lines)))
    process.kill()
    axis = next(line for line, below in itertools.pairwise(lines) if BAR.match(below))
    assert axis.split()[0] == "1"  # of the earlier process


def test_no_color_and_no_cursor_movements(
    terminal: Callable[[int, int], Terminal], begin: Callable[..., Process], recipe_file: Path,
):  # fmt: skip
    colorless, dumb = terminal(100, 30), terminal(100, 30)
    begin(colorless, "pretrain", recipe_file, "--out", "run", *ENDLESS, NO_COLOR="1")
    colorless.wait_for(lambda lines: any(BAR.match(line) for line in lines) and is_panel(lines))
    rows = colorless.screen.buffer.values()
    assert {cell.fg for row in rows for cell in row.values()} == {"default"}

    settings = ("--set", "train.steps=20", "--set", "log.every_steps=10")
    process = begin(dumb, "pretrain", recipe_file, "--out", "dumb", *settings, TERM="dumb")
    assert dumb.wait(process) == 0
    assert sum(" left " in line for line in dumb.shown) == 3  # the steps 1, 10 and 20
    assert not BRAILLE.search("".join(dumb.shown))


def test_a_closed_terminal_ends_nothing(
    begin: Callable[..., Process], recipe_file: Path, tmp_path: Path
):
    screen = Terminal(80, 24)  # the fixture would close it again
    process = begin(screen, "pretrain", recipe_file, "--out", "run", *ENDLESS)
    screen.wait_for(is_panel)
    screen.close()  # the kernel sends SIGHUP: save and stop
    process.log = tmp_path / "none"
    process.log.touch()
    assert process.wait() == 75
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "stopped"
