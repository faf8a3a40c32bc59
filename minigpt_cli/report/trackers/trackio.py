"""Trackio: a local database, or a Space or server that the user's environment names."""

import contextlib
import os
import sqlite3
import time
import warnings
from collections.abc import Callable
from typing import Any

from minigpt_cli.core.errors import first_line
from minigpt_cli.core.run_dir import TRACKIO
from minigpt_cli.report.trackers.tracker import TrackedRun, Tracker, in_shell

_DIRECTORY = "TRACKIO_DIR"
_PROJECT = "TRACKIO_PROJECT"
_REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")
_BUSY_SECONDS = 20  # to wait for another process's write


def start_trackio(run: TrackedRun, warn: Callable[[str], None]) -> Tracker:
    """Start or continue a run in the database, without its rows beyond the step.

    Rows of a Space or a server can't be removed from here: after going back, a run has a new part
    there, which is a new run in the same group and has all rows. On a network disk trackio writes
    no database but files for its dashboard: there each start is a new run.

    Args:
        run: the run.
        warn: takes what trackio, which raises no errors, warns of.

    Raises:
        ValueError: the project's name is not allowed.
        sqlite3.Error: the database can't be changed.
    """
    os.environ[_DIRECTORY] = os.environ.get(_DIRECTORY) or str(run.directory.absolute() / TRACKIO)
    import trackio  # here, because it reads TRACKIO_DIR when it is imported
    from trackio.sqlite_storage import SQLiteStorage
    from trackio.utils import get_storage_mode

    warnings.showwarning = _collector(warn)
    project = os.environ.get(_PROJECT) or "minigpt"
    remote = any(os.environ.get(name) for name in _REMOTE)
    options: dict[str, Any] = {
        "project": project,
        "group": run.unique_name,
        "config": run.settings,
        "embed": False,
    }
    next_step = 0
    if remote:
        name = run.with_part(run.unique_name)
        try:
            tracked = trackio.init(name=name, resume="must", **options)
            next_step = run.first_step
        except ValueError:  # it does not exist
            tracked = trackio.init(name=name, resume="never", **options)
    elif get_storage_mode() == "sqlite":
        name, database = run.unique_name, SQLiteStorage.get_project_db_path(project)
        if database.exists():
            next_step = _forget(database, name, run.first_step)
        tracked = trackio.init(name=name, resume="allow", **options)
    else:  # files that a dashboard reads later, and only then knows what runs there are
        name = f"{run.unique_name}-{time.strftime('%Y%m%d-%H%M%S')}"
        tracked = trackio.init(name=name, resume="never", **options)

    def log(step: int, seconds: float, values: dict[str, Any]) -> None:
        tracked.log(
            {
                name: trackio.Markdown(f"~~~~\n{value}\n~~~~") if isinstance(value, str) else value
                for name, value in values.items()
            },
            step=step,
        )

    # A server's address may end with the token that allows writing.
    place = next((os.environ[name] for name in _REMOTE if os.environ.get(name)), "")
    show = f"{_DIRECTORY}={in_shell(os.environ[_DIRECTORY])} trackio show --project {project}"
    return Tracker(
        log=log,
        finish=lambda exit_code: trackio.finish(),
        next_step=next_step,
        message=f"sent to {place.partition('?')[0]}" if remote else f"look at it with: {show}",
    )


def _forget(database: os.PathLike[str], name: str, first_step: int) -> int:
    """Delete a run's rows from ``first_step`` on; return the step after the last row left."""
    with contextlib.closing(sqlite3.connect(database, timeout=_BUSY_SECONDS)) as connection:
        tables = connection.execute("SELECT name FROM sqlite_master WHERE name = 'metrics'")
        if tables.fetchone() is None:  # the process that made the file was killed
            return 0
        with connection:
            connection.execute(
                "DELETE FROM metrics WHERE run_name = ? AND step >= ?", (name, first_step)
            )
        query = "SELECT MAX(step) FROM metrics WHERE run_name = ?"
        (last,) = connection.execute(query, (name,)).fetchone()
    return 0 if last is None else int(last) + 1


def _collector(warn: Callable[[str], None]) -> Callable[..., None]:
    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, UserWarning):  # not of features that will go away
            text = message if isinstance(message, Warning) else Warning(message)
            warn(first_line(text))

    return show
