"""What trackers have written, read by their own libraries: curves by name.

The libraries are imported where they are used: tests skip where they are missing.
"""

import json
import sqlite3
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wandb.proto.wandb_internal_pb2 import Record

Curves = dict[str, list[tuple[int, Any]]]
"""Name -> (step, value), in the order of the file."""


def tensorboard_curves(run: Path) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    curves: Curves = {
        tag: [(each.step, each.value) for each in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    for tag in events.Tags()["tensors"]:
        curves[tag] = [
            (each.step, each.tensor_proto.string_val[0].decode()) for each in events.Tensors(tag)
        ]
    return curves


def trackio_curves(database: Path) -> dict[str, Curves]:
    """The curves of each run in the database."""
    found: dict[str, Curves] = defaultdict(lambda: defaultdict(list))
    query = "SELECT run_name, step, metrics FROM metrics ORDER BY id"
    for name, step, text in sqlite3.connect(database).execute(query):
        for key, value in json.loads(text).items():
            pair = (step, value["_value"] if isinstance(value, dict) else value)
            if pair not in found[name][key][-1:]:  # "tokens" of a step and of its evaluation
                found[name][key].append(pair)
    return found


def wandb_runs(run: Path) -> list[tuple["Record", Curves]]:
    """Each offline run, in the order of their parts: its record, and its curves."""
    found = []
    for file in (run / "wandb").glob("offline-run-*/*.wandb"):
        curves: Curves = defaultdict(list)
        records = list(_records(file))
        for record in records:
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                curves[name].append((record.history.step.num, json.loads(item.value_json)))
        (about,) = {
            each.run.run_id: each for each in records if each.WhichOneof("record_type") == "run"
        }.values()
        found.append((about, curves))
    return sorted(found, key=lambda each: (len(each[0].run.run_id), each[0].run.run_id))


def _records(file: Path) -> Iterator["Record"]:
    """The records of a log of LevelDB's format, which W&B writes: blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = file.read_bytes()
    assert data.startswith(b":W&B")
    position, content = 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, size, kind = struct.unpack("<IHB", data[position : position + 7])
        position += 7 + size
        content += data[position - size : position]
        if kind in (1, 4):  # whole, or the last piece
            record = Record()
            record.ParseFromString(content)
            yield record
            content = b""


def logged(run: Path) -> Curves:
    """The same from metrics.jsonl; a step's "tokens" once, also if it was evaluated."""
    curves: Curves = defaultdict(list)
    for line in (run / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        for name, value in values.items():
            pair = (values["step"], value)
            if name not in ("step", "time") and value is not None and pair not in curves[name][-1:]:
                curves[name].append((values["step"], value))
    return curves
