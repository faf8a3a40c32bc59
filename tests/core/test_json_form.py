"""JSON from elsewhere is used only if it has the form that was agreed."""

from typing import Any, TypedDict

import pytest

from minigpt_cli.core.json_form import parse_json, printable


class Entry(TypedDict):
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
         tuple[dict[str, Entry], int, str | None],
         ({"x": {"bytes": 1, "sha256": "f"}}, 1, None)),
        (b'{"a": [1, {}]}', Any, {"a": [1, {}]}),
        ('"a\x1b[2Jb\r\u202ec\\nd\u00e9"'.encode().replace(b"\x1b", b"\\u001b")
         .replace(b"\r", b"\\r"), str, "a[2Jbc\nd\u00e9"),
    ],
)  # fmt: skip
def test_values(content: bytes, form: Any, value: Any):
    assert parse_json(content, form) == value


@pytest.mark.parametrize(
    ("content", "form"),
    [
        (b"", str), (b"{", str), (b"\xff", str), (b"1", None), (b"1", bool), (b"true", int),
        (b"1.0", int), (b"NaN", int), (b"1", str), (b"1", str | None), (b'["a", 1]', list[str]),
        (b'"a"', list[str]), (b'{"a": 1}', dict[str, str]), (b"[]", dict[str, str]),
        (b"[1]", tuple[int, int]), (b"[1, 2, 3]", tuple[int, int]), (b'{"bytes": 1}', Entry),
        (b'{"bytes": 1, "sha256": "f", "more": 1}', Entry), (b"[" * 100_000, Any),
        (b"9" * 5000, int),
    ],
)  # fmt: skip
def test_everything_else_is_refused(content: bytes, form: Any):
    with pytest.raises(ValueError):
        parse_json(content, form)


def test_printable():
    assert printable("a\x1b]0;b\x07c\n\x9bd") == "a]0;bc\nd"
