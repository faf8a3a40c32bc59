"""Checkpoints that somebody made to deceive: pickles, ways out of the directory, lies.

The manifest vouches for all of it. It must be refused as damage is, and nothing in it executed.
"""

import hashlib
import json
import os
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.faults.damage import Change, Damage
from tests.faults.scene import STEPS

WEIGHTS = "shard-00001-model-00001-of-00002.safetensors"
MOMENTS = "shard-00001-model-00002-of-00002.safetensors"
EMBEDDING = "weights.embed_tokens.weight"
Json = dict[str, Any]


def read_manifest(checkpoint: Path) -> Json:
    read: Json = json.loads((checkpoint / "manifest.json").read_text())
    return read


def lie(checkpoint: Path, **changes: object) -> None:
    """Change the manifest, and its checksum with it."""
    manifest = read_manifest(checkpoint) | changes
    manifest.pop("checksum")
    text = json.dumps(manifest, sort_keys=True)
    manifest["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def write(name: str, content: bytes, vouch: bool = True) -> Change:
    """Write a file and, where asked, have the manifest say that it is as it should be."""

    def do(checkpoint: Path) -> None:
        (checkpoint / name).write_bytes(content)
        if vouch:
            entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            lie(checkpoint, files=read_manifest(checkpoint)["files"] | {name: entry})

    return do


# --- pickles -------------------------------------------------------------------------------------


class _Executed:
    """What a pickle can do to who loads it."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.canary), "w")


def pickles(canary: Path) -> Iterator[Damage]:
    """Files whose loading would create ``canary``, under names that something might load."""
    content = pickle.dumps(_Executed(canary))
    for name in ("model.pt", ".metadata", "pytorch_model.bin", "__0_0.distcp"):
        yield Damage(f"a stray {name}", write(name, content, False), f"{name}: is not in the")
        yield Damage(f"{name} in the manifest", write(name, content), f"names {name}, which no")
    own = (WEIGHTS, MOMENTS, "state.json", "tokenizer.json", "recipe.toml")
    for name in (*own, "more.safetensors"):
        yield Damage(f"a pickle called {name}", write(name, content), name)
    name = "manifest.json"
    yield Damage(f"a pickle called {name}", write(name, content, False), name)


# --- ways out ------------------------------------------------------------------------------------


def ways_out(outside: Path) -> Iterator[Damage]:
    """Paths and links that lead to a file which is there, with the right sha256; and no files."""
    content = outside.read_bytes()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for name in (f"../../../{outside.name}", str(outside), "a/../state.json", "./state.json", "..",
                 ".", "", "/"):  # fmt: skip
        yield Damage(f"the manifest names {name!r}", _also(name, entry), "names a file outside it")
    for kind, make in (("a link", _link), ("a pipe", _pipe), ("a directory", _directory)):
        for name in (WEIGHTS, "state.json", "manifest.json"):
            yield Damage(f"{name} is {kind}", make(name), name)
    yield Damage("a link too many", _link_too_many, "more.safetensors: is not in the manifest")


def _also(name: str, entry: Json) -> Change:
    return lambda checkpoint: lie(
        checkpoint, files=read_manifest(checkpoint)["files"] | {name: entry}
    )


def _link(name: str) -> Change:
    def do(checkpoint: Path) -> None:
        elsewhere = (checkpoint / name).rename(checkpoint.parent.parent / f"elsewhere-{name}")
        (checkpoint / name).symlink_to(elsewhere)

    return do


def _pipe(name: str) -> Change:
    def do(checkpoint: Path) -> None:
        (checkpoint / name).unlink()
        os.mkfifo(checkpoint / name)

    return do


def _directory(name: str) -> Change:
    def do(checkpoint: Path) -> None:
        (checkpoint / name).unlink()
        (checkpoint / name).mkdir()

    return do


def _link_too_many(checkpoint: Path) -> None:
    (checkpoint / "more.safetensors").symlink_to(checkpoint / WEIGHTS)


# --- lies ----------------------------------------------------------------------------------------


def lies() -> Iterator[Damage]:
    """Manifests, states and safetensors headers that contradict themselves or each other."""
    for what, change, says in MANIFESTS:
        yield Damage(f"a manifest {what}", _manifest(change), says)
    for what, content in NO_MANIFESTS.items():
        yield Damage(f"a manifest that is {what}", write("manifest.json", content, False),
                     "manifest.json")  # fmt: skip
    for key, value in STATES:
        yield Damage(f"a state whose {key} is {value!r}", _state(key, value), "state.json")
    for what, header, says in HEADERS:
        yield Damage(what, _header(header), says)
    yield Damage("a header of 2**60 bytes", _huge_header, WEIGHTS)
    yield Damage("weights and moments exchanged", _exchange, WEIGHTS)


NO_MANIFESTS = {
    "empty": b"", "no JSON": b"{", "a list": b"[]", "a number": b"7", "null": b"null",
    "very deep": b"[" * 200_000, "not text": b"\xff\xfe",
}  # fmt: skip

MANIFESTS: list[tuple[str, Callable[[Json], object], str]] = [
    ("of another step", lambda m: m.update(step=STEPS + 1), "its manifest is of step"),
    ("whose step is text", lambda m: m.update(step=str(STEPS)), "is not a manifest"),
    ("whose step is a list", lambda m: m.update(step=[STEPS]), "is not a manifest"),
    ("of a later format", lambda m: m.update(format=99), "format 99"),
    ("whose val_loss is text", lambda m: m.update(val_loss="low"), "is not a manifest"),
    ("whose val_loss is NaN", lambda m: m.update(val_loss=float("nan")), "is not a manifest"),
    ("whose files are a list", lambda m: m.update(files=[]), "is not a manifest"),
    ("without files", lambda m: m.update(files={}), "is not in the manifest"),
    ("with a size that is text", lambda m: m["files"][WEIGHTS].update(bytes="1"), "is not a man"),
    ("with a negative size", lambda m: m["files"][WEIGHTS].update(bytes=-1), "is not a man"),
    ("with another sha256", lambda m: m["files"][WEIGHTS].update(sha256="0"), "sha256 differs"),
    ("whose tensors are a list", lambda m: m.update(tensors=[]), "is not a manifest"),
    ("without tensors", lambda m: m.update(tensors={}), "differ from the manifest"),
    (
        "with a tensor too many",
        lambda m: m["tensors"].update(x={"dtype": "float32", "shape": [2]}),
        "holds 0 of 2 elements of x",
    ),
    ("with a tensor that is text", lambda m: m["tensors"].update(x="float32"), "is not a manif"),
    ("with another dtype", lambda m: m["tensors"][EMBEDDING].update(dtype="float64"), EMBEDDING),
    ("without a dtype", lambda m: m["tensors"][EMBEDDING].pop("dtype"), "is not a manifest"),
    ("with a shape of text", lambda m: m["tensors"][EMBEDDING].update(shape="32"), EMBEDDING),
    ("with a negative shape", lambda m: m["tensors"][EMBEDDING].update(shape=[-1, 1]), EMBEDDING),
    ("with a huge shape", lambda m: m["tensors"][EMBEDDING].update(shape=[1 << 99]), EMBEDDING),
    ("with another shape", lambda m: m["tensors"][EMBEDDING]["shape"].reverse(), EMBEDDING),
]

STATES: list[tuple[str, object]] = [
    ("step", STEPS + 5), ("step", None), ("tokens", "many"), ("best_val_loss", "low"),
    ("scaler", [1]), ("dataset", 3), ("evaluated_step", None), ("skipped", -0.5), ("unheard_of", 1),
    ("data_offset", -50), ("tokens", -1), ("guard", {"skips": ["a"]}), ("guard", {"skips": [9**9]}),
    ("guard", {"losses": [1.0], "grad_norms": []}), ("guard", {"losses": [1e999]}),
    ("scaler", {"x": 1}),
]  # fmt: skip


def _places(change: Callable[[Json], object]) -> Callable[[Json], None]:
    """A header's change of what it says about where the shards belong."""

    def do(header: Json) -> None:
        places = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
        change(places)
        header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(places)

    return do


HEADERS: list[tuple[str, Callable[[Json], object], str]] = [
    ("a shard one row too low",
     _places(lambda p: p[EMBEDDING].update(saved_offsets=[1, 0])), EMBEDDING),
    ("a shard a million rows too low",
     _places(lambda p: p[EMBEDDING].update(saved_offsets=[10**6, 0])), EMBEDDING),
    ("a shard one row too high",
     _places(lambda p: p[EMBEDDING].update(saved_offsets=[-1, 0])), EMBEDDING),
    ("a shard in no place", _places(lambda p: p[EMBEDDING].update(saved_offsets="x")), WEIGHTS),
    ("a shard without a place", _places(lambda p: p.pop(EMBEDDING)), WEIGHTS),
    ("no places", lambda header: header.pop("__metadata__"), WEIGHTS),
    ("places that are no JSON",
     lambda header: header["__metadata__"].update(DCP_SHARDING_INFO="{"), WEIGHTS),
    ("a tensor beyond the file's end",
     lambda header: header[EMBEDDING].update(data_offsets=[0, 1 << 40]), WEIGHTS),
    ("a tensor of another name",
     lambda header: header.update(x=header.pop(EMBEDDING)), WEIGHTS),
]  # fmt: skip


def _manifest(change: Callable[[Json], object]) -> Change:
    def do(checkpoint: Path) -> None:
        content = read_manifest(checkpoint)
        change(content)
        lie(checkpoint, **content)

    return do


def _state(key: str, value: object) -> Change:
    def do(checkpoint: Path) -> None:
        content = json.loads((checkpoint / "state.json").read_text()) | {key: value}
        write("state.json", json.dumps(content).encode())(checkpoint)

    return do


def _header(change: Callable[[Json], object]) -> Change:
    def do(checkpoint: Path) -> None:
        content = (checkpoint / WEIGHTS).read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        content = struct.pack("<Q", len(text)) + text + content[8 + size :]
        write(WEIGHTS, content)(checkpoint)

    return do


def _huge_header(checkpoint: Path) -> None:
    content = (checkpoint / WEIGHTS).read_bytes()
    write(WEIGHTS, struct.pack("<Q", 1 << 60) + content[8:])(checkpoint)


def _exchange(checkpoint: Path) -> None:
    """Each under the other's name; nobody vouches for that."""
    weights, moments = ((checkpoint / name).read_bytes() for name in (WEIGHTS, MOMENTS))
    (checkpoint / WEIGHTS).write_bytes(moments)
    (checkpoint / MOMENTS).write_bytes(weights)
