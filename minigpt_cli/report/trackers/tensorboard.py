"""TensorBoard: event files in the run directory, one for each time the run starts or goes back."""

import os
import socket
import time
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from minigpt_cli.core.run_dir import TENSORBOARD
from minigpt_cli.report.trackers.tracker import TrackedRun, Tracker, in_shell

_PREFIX = "events.out.tfevents"
_OVERHEAD = 16  # bytes of a record: its length and two checksums


def start_tensorboard(run: TrackedRun) -> Tracker:
    """Start a new event file. Its first event makes readers forget later steps of older files.

    Raises:
        OSError: it can't be written.
    """
    folder = run.directory / TENSORBOARD
    folder.mkdir(exist_ok=True)
    is_new = not any(folder.glob(f"{_PREFIX}.*"))
    # Readers take the files in the order of their names.
    name = f"{_PREFIX}.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
    file = open(folder / name, "xb", buffering=0)  # noqa: SIM115

    def write(event: Event) -> None:
        """Append a whole record, or nothing: readers stop at a torn one."""
        size = file.tell()
        try:
            RecordWriter(file).write(event.SerializeToString())
            if file.tell() != size + event.ByteSize() + _OVERHEAD:
                raise OSError("the disk is full")
        except OSError:
            file.truncate(size)
            file.seek(size)
            raise

    last_steps: dict[str, int] = {}

    def log(step: int, seconds: float, values: dict[str, Any]) -> None:
        summary = Summary()
        for name, value in values.items():
            if last_steps.get(name) == step:  # "tokens" of a step and of its evaluation
                continue
            last_steps[name] = step
            if isinstance(value, str):
                summary.value.extend(text_pb(name, _as_code(value)).value)
            else:
                summary.value.add(tag=name, simple_value=value)
        write(Event(wall_time=seconds, step=step, summary=summary))

    now, first = time.time(), run.first_step
    write(Event(wall_time=now, file_version="brain.Event:2"))
    restart = SessionLog(status=SessionLog.START)
    write(Event(wall_time=now, step=first, session_log=restart))  # the purge_step of other writers
    log(first, now, {"recipe": run.recipe})
    return Tracker(
        log=log,
        finish=lambda exit_code: file.close(),
        next_step=0 if is_new else first,
        message=f"look at it with: tensorboard --logdir {in_shell(folder)}",
    )


def _as_code(text: str) -> str:
    """Return Markdown that shows a text as it is."""
    return "\n".join(f"    {line}" for line in text.split("\n"))
