"""Weights & Biases, also offline. The user's environment and settings files come first."""

import html
import os
from typing import Any

import wandb

from minigpt_cli.core.errors import UserError, first_line
from minigpt_cli.report.trackers.tracker import TrackedRun, Tracker, in_shell

_TIMEOUT = "WANDB_INIT_TIMEOUT"
_START_SECONDS = 30  # for the service's answer


def check_wandb() -> bool:
    """Check the login, without asking a person or the service.

    Returns:
        Whether a run can be continued later: an offline one can't, because ``wandb sync`` replaces
        what it uploaded before under the same id.

    Raises:
        UserError: there is no login.
    """
    os.environ["WANDB_SILENT"] = "true"  # else login() asks the service for the user's name
    if wandb.setup().settings.mode not in ("online", "shared"):
        return False
    try:
        is_logged_in = wandb.login(prompt=False, verify=False)
    except wandb.errors.Error as error:
        raise UserError(
            f"wandb: {first_line(error)}; run wandb login, or set WANDB_MODE=offline"
        ) from None
    if not is_logged_in:
        raise UserError("wandb has no API key: run wandb login, or set WANDB_MODE=offline")
    return True


def start_wandb(run: TrackedRun) -> Tracker:
    """Start or continue a run of the service; without an answer, start an offline one.

    The service can't go back: after that, a run has a new part, which is a new run in the same
    group and has all rows.

    Raises:
        wandb.errors.Error: it can't start.
    """
    settings = wandb.setup().settings
    options: dict[str, Any] = {
        "config": run.settings,
        "resume": "allow",
        "name": settings.run_name or run.with_part(run.name),
        "group": settings.run_group or run.unique_name,
        "project": settings.project or "minigpt",
        "settings": wandb.Settings(
            console="off",
            init_timeout=settings.init_timeout if _TIMEOUT in os.environ else _START_SECONDS,
            **_watched_process(),
        ),
    }
    if "WANDB_DIR" not in os.environ:
        options["dir"] = run.directory
    id, trouble = run.with_part(settings.run_id or run.id), ""
    try:
        tracked = wandb.init(id=id, **options)
    except wandb.errors.CommError as error:
        wandb.teardown()
        trouble = f"no answer ({first_line(error)}), so rows are kept on this machine; "
        tracked = wandb.init(id=f"{id}-offline", **options, mode="offline")

    def log(step: int, seconds: float, values: dict[str, Any]) -> None:
        shown = {name: _shown(value) for name, value in values.items()}
        tracked.log(shown | {"_timestamp": seconds}, step=step)

    if tracked.disabled:
        message = "does nothing, because its mode is disabled"
    else:
        upload = f"upload it with: wandb sync {in_shell(tracked.settings.sync_dir)}"
        message = tracked.url or trouble + upload
    return Tracker(
        log=log,
        finish=lambda exit_code: tracked.finish(exit_code=exit_code or 0),
        next_step=tracked.step,
        message=message,
    )


def _shown(value: Any) -> Any:
    return wandb.Html(f"<pre>{html.escape(value)}</pre>") if isinstance(value, str) else value


def _watched_process() -> dict[str, int]:
    """The service's own charts are of the training process, not of the tracker's."""
    name = "x_stats_pid"  # not part of the stable interface
    return {name: os.getppid()} if name in wandb.Settings.model_fields else {}
