"""Mutate one file: change what its format means, or its bytes, or what lies in its place."""

import copy
import itertools
import json
import os
import random
import struct
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 255, 65_536, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.5,
    -0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf"), "", " ", "x", "0", "nan",
    "1e999", "../../canary", "../canary", "/etc/hostname", "/dev/zero", ".", "..", "a/b", "a\0b",
    "\x1b[2J\x07red", "line\nline", "\u202eright to left", "\ud800", "é\u0301😀", "x" * 100_000,
    "%s%n{0}{}", "[bold]b[/]", [], {}, [[]], [1, 2, 3], ["x", None], {"x": 1}, [0] * 10_000,
    {"__class__": "os.system"},
]  # fmt: skip
VALUES = [
    "", "0", "1", "2", "-1", "3", "1e3", "x", "9" * 50, "\x1b[2J", "é", "\udcff\udcfe", "127.0.0.1",
    "[::1", "localhost", "::1", "65536", "29471", " 1 ", "0x10", "1_0", "True", "2(x1)", "(", "nan",
    "1(x999999)", "/dev/null", "canary", "a\nb", "x" * 70_000, "256.1.1.1", "no.such.host.invalid",
    "dumb", "C", "xx_YY.UTF-8", "auto", "cuda", "cuda:99", "meta", "mps", "-h", "--version",
    "[1,2]", "{a=1}", "'x'", '"', "[[",
]  # fmt: skip
PATHS = [
    "nothing", "fifo", "loop", "hole", "/dev/zero", "/dev/null", "/dev/full", "/proc/self/mem", "/",
    "/proc/self/fd/0", "corpus", "corpus/*.txt", "**", "[", "{a,b}", "~", "", ".", "-", "--", "run",
    "run/checkpoints", "run/checkpoints/step-00000002", "run/final", "run/metrics.jsonl", "data",
    "data/train-00000.npy", "base", "adapter", "tuned", "tiny.toml", "chat.jsonl", "table.parquet",
    "text.txt.xz", "org/name", "http://x/y", "python-stdlib/x", "\udcff\udcfe", "a" * 300,
    "/".join(["a" * 9] * 500),
]  # fmt: skip
TEMPLATES = [
    "{{ 9**9**9 }}", "{{ 10**10**7 }}", "{{ 1/0 }}", "{{", "{% if %}", "", "x", "\0\x07",
    "{{ x.y.z }}",
    "{% for i in range(10**9) %}x{% endfor %}", "{{ messages[0].content * 10**9 }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ ''.__class__.__mro__[1] }}",
    "{% include '/etc/hostname' %}", "{{ raise_exception('a\nb\x1b[2J') }}", "{{ '\ud800' }}",
    "{{ messages|tojson(indent=10**8) }}", "{{ 'x'|center(10**10) }}", "{{ '%1000000000d' % 1 }}",
    "{{ '{:>9999999999}'.format(1) }}", "{{ cycler.__init__.__globals__ }}",
    "{{ lipsum(n=10**7) }}",
    "{% set n = namespace(a=1) %}{% for i in range(10**8) %}{% set n.a = n.a * 2 %}{% endfor %}",
    "{{ messages[99].content }}", "{{ messages[0]['role'] + 1 }}", "{{ [1]*10**10 }}",
    "{{ strftime_now('%Y' * 99) }}", "{{ ('a'*10**6)|wordwrap(1) }}", "{{ messages|sort|join }}",
    "{% generation %}x{% endgeneration %}", "{{ range(10**8)|list|length }}",
    "{{ 'a'|batch(10**10)|list }}", "{{ messages.append(messages) }}{{ messages }}",
    "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "{% if 1 %}" * 3000,
]  # fmt: skip
_CONTROL = [
    b"\0",
    b"\x1b[31m",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\r",
    b"\x80",
    b"\xed\xa0\x80",
    b"\n",
]
_WHOLE = [
    b"", b"null", b"[]", b"{}", b"0", b'""', b"true", b"NaN", b"\xef\xbb\xbf{}", b"\0" * 5000,
    b"\xff" * 300, b"[" * 100_000, b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 50_000, b"9" * 5_000,
    b"\x80\x04cos\nsystem\n", "{}".encode("utf-16"), b"a" * 3_000_000, b"\n" * 10_000,
]  # fmt: skip
_NPY = [
    ("'<u2'", "'<u4'"), ("'<u2'", "'|O'"), ("'<u2'", "'>u2'"), ("'<u2'", "'<f8'"),
    ("False", "True"),
    ("'<u2'", "[('a','<u2')]"), ("(", "(-"), ("(", "(9"), ("(", "(2, "), ("shape", "shap"),
    ("{", "("), ("{", "{'x': 1, "), ("{", "[" * 3000), (",)", "**9**9,)"), ("(", "(" + "9" * 5000),
    ("}", "} + __import__('os')"), ("'<i8'", "'|O'"), ("'|b1'", "'<u1'"),
]  # fmt: skip


def mutate(chance: random.Random, file: Path) -> str:
    """Mutate a file in its place; return what was done, in a few words."""
    draw = chance.random()
    if draw < 0.08 or file.is_symlink() or not file.is_file():
        return f"{file}: {_replace(chance, file)}"
    if file.stat().st_size > 1 << 24:
        return f"{file}: stays large"
    content = file.read_bytes()
    by_format = _FORMATS.get(file.suffix)
    if by_format is None or draw < 0.3:
        new, what = _bytes(chance, content)
    else:
        try:
            new, what = by_format(chance, content)
        except Exception:  # mutated before: it has no structure any more
            new, what = _bytes(chance, content)
    file.write_bytes(new)
    return f"{file}: {what}"


def _replace(chance: random.Random, file: Path) -> str:
    """Put something else in the file's place."""
    ways: dict[str, Callable[[], object]] = {
        "is missing": lambda: None,
        "a FIFO": lambda: os.mkfifo(file),
        "a directory": lambda: file.mkdir(),
        "a link to nothing": lambda: file.symlink_to("nothing"),
        "a link to itself": lambda: file.symlink_to(file.name),
        "a link to the canary": lambda: file.symlink_to(os.path.abspath("../canary")),
        "a link to /dev/zero": lambda: file.symlink_to("/dev/zero"),
        "a link to /dev/full": lambda: file.symlink_to("/dev/full"),
        "a link to a directory": lambda: file.symlink_to(".."),
        # Of 64 GiB; an .xz file may end with any number of zeros, which takes minutes.
        "a hole": lambda: (
            file.touch(),
            os.truncate(file, 1 << (24 if file.suffix == ".xz" else 36)),
        ),
    }
    what = chance.choice(list(ways))
    if file.is_dir() and not file.is_symlink():
        free = (file.with_name(f"moved{index}-{file.name}") for index in itertools.count())
        file.rename(next(name for name in free if not name.exists()))
    else:
        file.unlink(missing_ok=True)
    ways[what]()
    return what


def _bytes(chance: random.Random, content: bytes) -> tuple[bytes, str]:
    """Mutate bytes of any format, more often near the beginning, where headers are."""
    size = len(content)
    place = chance.randrange(1 + (size if chance.random() < 0.5 else min(size, 200)))
    far = min(size, place + chance.choice([1, 2, 8, 100, 5000]))
    kind = chance.choice(
        ["flip", "flip", "flips", "cut", "insert", "remove", "repeat", "zeros", "whole"]
    )
    if kind == "whole":
        new = chance.choice(_WHOLE)
        return new, f"is {new[:20]!r}, {len(new)} bytes"
    new = {
        "flip": lambda: _flipped(chance, content, place, 1),
        "flips": lambda: _flipped(chance, content, place, 20),
        "cut": lambda: content[:place],
        "insert": lambda: content[:place] + chance.choice(_CONTROL) + content[place:],
        "remove": lambda: content[:place] + content[far:],
        "repeat": lambda: content[:far] + content[place:],
        "zeros": lambda: content[:place] + bytes(far - place) + content[far:],
    }[kind]()
    return new, f"{kind} at byte {place} of {size}"


def _flipped(chance: random.Random, content: bytes, place: int, count: int) -> bytes:
    new = bytearray(content)
    for where in range(place, min(len(new), place + count)):
        new[where] ^= 1 << chance.randrange(8)
    return bytes(new)


def _tree(chance: random.Random, tree: Any) -> tuple[Any, str]:
    """Mutate one value of nested dictionaries and lists."""
    tree = copy.deepcopy(tree)
    places = _places(tree)
    if not places:
        return chance.choice(ODD), "all of it"
    container, key, name = chance.choice(places)
    kind = chance.choice(
        ["odd", "odd", "odd", "near", "near", "remove", "add", "rename", "copy", "nest"]
    )
    old = container[key]
    if kind == "near":
        container[key] = _near(chance, old)
    elif kind == "remove":
        del container[key]
    elif kind == "add" and isinstance(container, dict):
        unknown = chance.choice(["unknown", "", "__proto__", "format", "type", "é\x1b[2J"])
        container[unknown] = chance.choice(ODD)
    elif kind == "rename" and isinstance(container, dict):
        container[key + chance.choice(["_", "s", "\0", "/../x"])] = container.pop(key)
    elif kind == "copy":
        container[key] = copy.deepcopy(chance.choice(places)[0])
    elif kind == "nest":
        for _ in range(chance.choice([1, 3, 500])):
            container[key] = [container[key]] if chance.random() < 0.5 else {"x": container[key]}
    else:
        kind, container[key] = "odd", chance.choice(ODD)
    new = repr(container[key])[:40] if kind != "nest" and key in _keys(container) else kind
    return tree, f"{kind} {name}: {old!r:.40} -> {new}"


def _keys(container: Any) -> Any:
    return container if isinstance(container, dict) else range(len(container))


def _places(tree: Any, name: str = "") -> list[tuple[Any, Any, str]]:
    """All (container, key, name) of a tree; long lists and tables by their ends."""
    found: list[tuple[Any, Any, str]] = []
    keys = list(_keys(tree)) if isinstance(tree, dict | list) else []
    for key in keys if len(keys) < 40 else keys[:15] + keys[-15:]:
        found += [(tree, key, f"{name}.{key}"), *_places(tree[key], f"{name}.{key}")]
    return found


def _near(chance: random.Random, value: Any) -> Any:
    """Return a value of the same type that is a little off."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int):
        near = [value + 1, value - 1, -value, value * 2, value // 2, value * 1000]
        return chance.choice([*near, float(value), str(value)])
    if isinstance(value, float):
        return chance.choice([-value, value * 1e6, value / 1e6, 1 - value, str(value)])
    if isinstance(value, str):
        near = [value[:-1], value * 2, value.upper(), f" {value}", f"../{value}", value + "\n"]
        return chance.choice([*near, [value]])
    if isinstance(value, list):
        return chance.choice([value[:-1], value * 2, value[::-1], dict(enumerate(value))])
    return list(value.items())


def _json(chance: random.Random, content: bytes) -> tuple[bytes, str]:
    tree, what = _tree(chance, json.loads(content))
    text = json.dumps(tree, indent=chance.choice([None, 1, 1, 1]))
    draw = chance.random()
    if draw < 0.05:  # a key twice
        text = text.replace("{", '{"format": 1, ', 1)
    elif draw < 0.1:
        text = text.replace(": ", ": " + "[" * 100_000, 1)
    return text.encode(), what


def _jsonl(chance: random.Random, content: bytes) -> tuple[bytes, str]:
    lines = content.splitlines(keepends=True)
    number = chance.randrange(len(lines))
    new, what = _json(chance, lines[number])
    lines[number] = b" ".join(new.split(b"\n")) + b"\n"
    return b"".join(lines), f"line {number + 1}: {what}"


def _toml(chance: random.Random, content: bytes) -> tuple[bytes, str]:
    tree, what = _tree(chance, tomllib.loads(content.decode()))
    return tomli_w.dumps(tree).encode(), what


def _npy(chance: random.Random, content: bytes) -> tuple[bytes, str]:
    """Mutate the header, or the numbers."""
    import numpy as np  # here: it reads OMP_NUM_THREADS when it is imported

    size = struct.unpack("<H", content[8:10])[0]
    header, rest = content[10 : 10 + size], content[10 + size :]
    if chance.random() < 0.4:
        numbers = np.frombuffer(rest, "<u2").copy()
        numbers[chance.randrange(len(numbers))] = chance.choice([0, 299, 300, 320, 1000, 65_535])
        return content[: 10 + size] + numbers.tobytes(), "a number changed"
    old, new = chance.choice(_NPY)
    header = header.replace(old.encode(), new.encode(), 1)
    length = struct.pack("<H", len(header) & 0xFFFF) if chance.random() < 0.7 else content[8:10]
    return content[:8] + length + header + rest, f"header {old} -> {new[:20]}"


def _safetensors(chance: random.Random, content: bytes) -> tuple[bytes, str]:
    """Mutate the header, its length, or the numbers."""
    size = struct.unpack("<Q", content[:8])[0]
    header, rest = content[8 : 8 + size], content[8 + size :]
    draw = chance.random()
    if draw < 0.15:
        length = chance.choice([0, 1, size - 1, size + 1, 2**32, 2**63, 2**64 - 1, 100_000_001])
        return struct.pack("<Q", length) + content[8:], f"header length {length}"
    if draw < 0.3:
        word = chance.choice([b"\xff\xff\xff\xff", b"\0\0\xc0\x7f", b"\0\0\x80\x7f"])
        place = 4 * chance.randrange(max(1, len(rest) // 4))
        return content[: 8 + size] + rest[:place] + word + rest[
            place + 4 :
        ], f"number at {place} is {word!r}"
    new, what = _json(chance, header)
    return struct.pack("<Q", len(new)) + new + rest, f"header {what}"


_FORMATS: dict[str, Callable[[random.Random, bytes], tuple[bytes, str]]] = {
    ".json": _json, ".jsonl": _jsonl, ".toml": _toml, ".npy": _npy, ".safetensors": _safetensors,
}  # fmt: skip
