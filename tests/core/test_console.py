"""Names and texts of others can't write commands to the terminal."""

from pathlib import Path

import pytest

from minigpt_cli.core.console import printable
from tests.helpers.processes import minigpt

CLEAR = "\x1b[2J\x1b]0;title\x07"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("naïve 東京 👩‍👩‍👧 \ta\u00a0b", "naïve 東京 👩‍👩‍👧 \ta\u00a0b"),
        (CLEAR, r"\x1b[2J\x1b]0;title\x07"),
        ("a\nminigpt: b\r\x08", r"a\x0aminigpt: b\x0d\x08"),
        ("\x7f\x9b2J\x85", r"\x7f\x9b2J\x85"),
        ("\u2028\u202etxt\u2066", r"\u2028\u202etxt\u2066"),
        ("half \udce9", r"half \udce9"),
        ("", ""),
    ],
)
def test_printable(text: str, shown: str):
    assert printable(text) == shown


def test_line_breaks_of_a_text():
    assert printable("a\n\x1bb", keep="\n") == "a\n\\x1bb"


@pytest.mark.parametrize(
    "arguments",
    [
        ("verify", "{name}"), ("eval", "{name}"), ("sample", "{name}"), ("resume", "{name}"),
        ("pretrain", "{name}"), ("pretrain", "{name}.toml"), ("tokenize", "{name}", "--out", "o"),
        ("export", "{name}", "out"), ("verify", "--{name}"), ("{name}",),
    ],
)  # fmt: skip
def test_a_name_in_an_error(tmp_path: Path, arguments: tuple[str, ...]):
    name = f"x{CLEAR}\n\udce9"
    (tmp_path / f"{name}.toml").write_text("[\x1b[2J]\n")
    done = minigpt(*[each.format(name=name) for each in arguments], cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("minigpt: ")
    assert len(done.stderr.splitlines()) == 1
    assert "\x1b" not in done.stderr
    assert "\x07" not in done.stderr


def test_a_received_file_in_an_error(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "\\u001b[2J\\n' + "x" * 10**6 + '"}')
    done = minigpt("eval", tmp_path)
    assert done.returncode == 2
    assert r"model_type \x1b[2J\x0axxx" in done.stderr
    assert len(done.stderr) < 5000
