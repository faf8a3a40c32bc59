import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import pytest

from minigpt_cli.core.errors import Damaged, UserError
from minigpt_cli.core.reading import build, parse_form, parse_json, read_bytes, read_json, read_text


def test_pipes_devices_and_directories_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for file in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match="is not a regular file"):
            read_bytes(file)
    with pytest.raises(UserError, match="no such file"):
        read_bytes(tmp_path / "none")
    with pytest.raises(UserError, match="can't be read"):
        read_bytes(tmp_path / "a\0b")


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    assert read_json(tmp_path / "link") == {}


def test_size_and_encoding(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    assert read_bytes(file, limit=5) == b"12345"
    with pytest.raises(Damaged, match="larger than 4 bytes"):
        read_bytes(file, Damaged, limit=4)
    file.write_bytes(b"12\xff45")
    with pytest.raises(UserError, match="byte 2 is not UTF-8"):
        read_text(file)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"a":' * 200 + "1" + "}" * 200,
        "[1]",
        "null",
        "",
        "{'a': 1}",
        "9" * 10_000,
        '{"a": "\\ud800"}',
        '{"a": "\\uDC00"}',
        '{"\\ud83d": 1}',
        "\ufeff{}",
        b'{"a": "\xff"}',
        b'{"a": "\xed\xa0\x80"}',
        "{}".encode("utf-16"),
    ],
)
def test_anything_else_than_a_json_object_is_one_line(content: bytes | str) -> None:
    with pytest.raises(Damaged) as error:
        parse_json(content, "it", Damaged)
    assert str(error.value).startswith("it: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


def test_surrogate_pairs_are_text() -> None:
    assert parse_json(rb'{"a": "\ud83d\ude00"}', "it") == {"a": "\U0001f600"}


@dataclass(frozen=True)
class _Inner:
    count: int
    share: float | None = None


@dataclass(frozen=True)
class _Outer:
    name: str
    parts: tuple[_Inner, ...]
    by_name: dict[str, list[int]]
    pair: tuple[int, str] = (0, "")
    anything: Any = None


def test_build_makes_dataclasses_of_json() -> None:
    content = parse_json(
        '{"name": "a", "parts": [{"count": 1}, {"count": 2, "share": 3}], "by_name": {"x": [1, 2]},'
        ' "pair": [4, "b"], "anything": {"y": [null]}}',
        "it",
    )
    assert build(_Outer, content) == _Outer(
        "a", (_Inner(1), _Inner(2, 3)), {"x": [1, 2]}, (4, "b"), {"y": [None]}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 1}, "name is not of the right type: 1"),
        ({"parts": {}}, "parts is not of the right type: {}"),
        ({"parts": [{"count": True}]}, r"parts\[0\].count is not of the right type: True"),
        (
            {"parts": [{"count": 1}, {"count": -1}]},
            r"parts\[1\].count is not of the right type: -1",
        ),
        ({"parts": [{"count": 1, "share": float("nan")}]}, "share is not of the right type: nan"),
        ({"parts": [{}]}, "count is missing"),
        ({"parts": [None]}, r"parts\[0\] is not of the right type: None"),
        ({"by_name": {"x": ["1"]}}, r"by_name.x\[0\] is not of the right type: '1'"),
        ({"pair": [1]}, r"pair is not of the right type: \[1\]"),
        ({"more": 1}, "'more' is unknown"),
        ({"parts": [{"count": 1 << 63}]}, "count is not of the right type: 9223"),
    ],
)
def test_build_names_what_is_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(_Outer, {"name": "a", "parts": [], "by_name": {}} | change)


class _Entry(TypedDict):
    bytes: int
    sha256: str


@pytest.mark.parametrize(
    ("content", "form", "value"),
    [
        (b"null", None, None),
        (b"true", bool, True),
        (b"3", int, 3),
        (b'"a"', str | None, "a"),
        (b"null", str | None, None),
        (b'["a", "b"]', list[str], ["a", "b"]),
        (b'[{"x": {"bytes": 1, "sha256": "f"}}, 1, null]',
         tuple[dict[str, _Entry], int, str | None],
         ({"x": {"bytes": 1, "sha256": "f"}}, 1, None)),
        (b'{"a": [1, {}]}', Any, {"a": [1, {}]}),
    ],
)  # fmt: skip
def test_messages_of_a_known_form(content: bytes, form: Any, value: Any) -> None:
    assert parse_form(content, form) == value


@pytest.mark.parametrize(
    ("content", "form"),
    [
        (b"", str), (b"{", str), (b"\xff", str), (b"1", None), (b"1", bool), (b"true", int),
        (b"1.0", int), (b"NaN", int), (b"1", str), (b"1", str | None), (b'["a", 1]', list[str]),
        (b'"a"', list[str]), (b'{"a": 1}', dict[str, str]), (b"[]", dict[str, str]),
        (b"[1]", tuple[int, int]), (b"[1, 2, 3]", tuple[int, int]), (b'{"bytes": 1}', _Entry),
        (b'{"bytes": 1, "sha256": "f", "more": 1}', _Entry), (b"[" * 100_000, Any),
        (b"9" * 5000, int),
    ],
)  # fmt: skip
def test_messages_of_another_form(content: bytes, form: Any) -> None:
    with pytest.raises(ValueError):
        parse_form(content, form)


def test_names_of_files_that_are_no_text_reach_other_ranks() -> None:
    assert parse_form(b'"runs/caf\\udce9"', str) == "runs/caf\udce9"


def test_json_is_limited(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"a": [' + "[]," * (6 << 20) + "0]}")
    with pytest.raises(UserError, match="is larger than 16,777,216 bytes"):
        read_json(file)
