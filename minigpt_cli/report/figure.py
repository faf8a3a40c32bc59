"""Runs -> a PNG of four charts, for a paper or a chat. Needs matplotlib (the extra ``plot``)."""

import importlib.util
import io
import warnings
from typing import TYPE_CHECKING

import numpy as np

from minigpt_cli.core.console import printable
from minigpt_cli.core.errors import UserError
from minigpt_cli.report.curves import Columns, Curve, thinned
from minigpt_cli.report.numbers import numbers_of
from minigpt_cli.report.run_contents import RunContents

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SOFTWARE = "minigpt report"
PNG_MARKER = b"tEXtSoftware\0minigpt report"  # only such a file is replaced
PNG_MARKER_WITHIN = 4096  # bytes from the file's beginning
_COLORS = ("#0072b2", "#cb6476", "#9b8e26", "#8e13fb", "#411102", "#190c40")  # as in report.css
_DASHES = ("-", "--", ":", "-.")
_PANELS = (
    ("loss", "loss (points: validation; red: incidents)"),
    ("lr", "learning rate"),
    ("grad_norm", "gradient norm (dashed: clip_norm)"),
    ("tokens_per_second", "tokens per second"),
)


def check_matplotlib() -> None:
    """Refuse ``--png`` where matplotlib is missing.

    Raises:
        UserError: it is.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--png needs matplotlib: pip install 'minigpt-cli[plot]'")


def render_png(runs: list[RunContents]) -> bytes:
    """Return the image: loss, learning rate, gradient norm and throughput over steps."""
    import matplotlib
    from matplotlib.figure import Figure

    # A name is text: neither a formula between dollar signs nor an error where a glyph is missing.
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure = Figure(figsize=(11, 7), dpi=130, layout="constrained")
        panels = figure.subplots(2, 2).flatten()
        for axes, (key, title) in zip(panels, _PANELS, strict=True):
            axes.set_title(title, fontsize=10, loc="left")
            axes.set_xlabel("step", fontsize=9)
            axes.tick_params(labelsize=8)
            axes.grid(alpha=0.3)
            for number, run in enumerate(runs):
                _draw(axes, key, number, run)
        lines, _ = panels[0].get_legend_handles_labels()
        names = [printable(run.name)[:60] for run in runs]
        if len(runs) > 1:
            figure.legend(lines, names, loc="outside lower center", ncols=4, fontsize=9)
        else:
            figure.suptitle(names[0], fontsize=12)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": SOFTWARE})
    return file.getvalue()


def _draw(axes: "Axes", key: str, number: int, run: RunContents) -> None:
    color, dash = _COLORS[number % 6], _DASHES[number // 6 % 4]
    # A label that begins with "_" would be left out of the legend, so the names come later.
    _draw_curve(axes, run.metrics.training, key, color, dash, label=str(number))
    if key == "loss":
        _draw_curve(axes, run.metrics.validation, "val_loss", color, ":", marker="o")
        for each in run.incidents:
            axes.axvline(each.step, color="#a8201a", linewidth=0.8, alpha=0.6)
    clip = numbers_of(run).clip if key == "grad_norm" else None
    if clip is not None and clip.clip_norm:
        axes.axhline(clip.clip_norm, color=color, linewidth=1, linestyle="--")


def _draw_curve(
    axes: "Axes",
    columns: Columns,
    key: str,
    color: str,
    dash: str,
    marker: str = "",
    label: str | None = None,
) -> None:
    places, curves = thinned(columns)
    curve = curves.get(key, Curve(np.empty(0)))
    steps = places["step"] if key in curves else np.empty(0)
    if curve.low is not None and curve.high is not None:
        axes.fill_between(steps, curve.low, curve.high, color=color, alpha=0.2, linewidth=0)
    marker = marker or ("." if len(steps) < 3 else "")
    axes.plot(
        steps,
        curve.mean,
        dash,
        color=color,
        linewidth=1.2,
        marker=marker,
        markersize=4,
        label=label,
    )
