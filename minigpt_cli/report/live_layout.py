"""The lines of the live view, for a terminal of any size."""

import math
import time
from typing import Any

from rich.text import Text

from minigpt_cli.core.console import printable
from minigpt_cli.core.memory import format_size
from minigpt_cli.report.curve import (
    ASCII_LOSS_MARK,
    ASCII_VALIDATION_MARK,
    LOSS_MARK,
    LOSS_STYLE,
    VALIDATION_MARK,
    VALIDATION_STYLE,
    curve_lines,
)
from minigpt_cli.report.live_state import LiveState

_WIDE = 120  # columns from which the numbers stand beside the curve
_TABLE_WIDTH = 44
_MOST_CURVE, _LEAST_CURVE = 18, 5  # lines
_MOST_SAMPLE = 400  # characters of a sample that are looked at


def duration(seconds: float) -> str:
    """Return a duration as h:mm:ss or m:ss; "?" if it isn't known."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def view_lines(state: LiveState, width: int, height: int, *, ascii_only: bool) -> list[Text]:
    """Lay out the live view.

    From 120 columns on, the numbers stand in a table beside the curve; else in lines below it. On a
    terminal that is too small for a curve there is none.

    Args:
        state: what to show.
        width, height: of the terminal, in cells.
        ascii_only: whether it shows nothing else.

    Returns:
        Lines that are narrower than ``width``; fewer than ``height`` of them.
    """
    width, fields = width - 1, _fields(state)  # a full last column would wrap on some terminals
    sample = _sample_lines(state.sample, 3 if height >= 40 else 1, ascii_only)
    bar = [_bar_line(state, width, ascii_only)]
    room = height - max(5, height // 4) - 3 - len(sample)  # for the history, two titles and the bar
    is_wide = width >= _WIDE and room > len(fields)
    below = [] if is_wide else _packed(fields, width)
    curve_height = min(_MOST_CURVE, room - len(below))
    curve: list[Text] = []
    if curve_height >= _LEAST_CURVE and width >= 40 and (state.losses or state.validation):
        curve_width = width - _TABLE_WIDTH - 2 if is_wide else width
        curve = curve_lines(
            state.losses, state.validation, curve_width, curve_height, ascii_only=ascii_only
        )
        if is_wide:
            curve = _beside(curve, _table(fields), curve_width)
    elif is_wide:
        curve = _table(fields)
    lines = [Text(), _title(state, ascii_only), *curve, *bar, *below, *sample]
    if len(lines) >= height:  # a few rows only
        lines = bar if height > 1 else []
    if width < 10:
        lines = []
    for line in lines:
        line.truncate(width, overflow="crop" if ascii_only else "ellipsis")
    return lines


def _title(state: LiveState, ascii_only: bool) -> Text:
    """Return the last losses, which are also the curve's legend."""
    title = Text()
    last = state.losses[-1][1] if state.losses else None  # before the first step after a resume
    loss = state.values["loss"] if state.values else last
    if loss is not None:
        title.append(f"{ASCII_LOSS_MARK if ascii_only else LOSS_MARK} ", style=LOSS_STYLE)
        title.append(f"loss {loss:.4f}", style="bold")
    if state.validation:
        mark = ASCII_VALIDATION_MARK if ascii_only else VALIDATION_MARK
        title.append("   " if title else "").append(f"{mark} ", style=VALIDATION_STYLE)
        title.append(f"validation {state.validation[-1][1]:.4f}", style="bold")
        if state.best and state.best[0] != state.validation[-1][0]:
            title.append(f" (best {state.best[1]:.4f} at step {state.best[0]:,})")
    return title if title else Text("waiting for the first logged step", style="dim")


def _fields(state: LiveState) -> list[tuple[str, str]]:
    """Return (name, value) of each number that is known."""
    fields = []
    if values := state.values:
        fields.append(("lr", f"{values['lr']:.2e}"))
        fields.append(("grad norm", f"{values['grad_norm']:.3f}"))
        if state.clip_norm and state.norms:
            fields.append(("clipped", f"{state.clipped / state.norms:.0%} of logged steps"))
        fields.append(("tok/s", f"{values['tokens_per_second']:,.0f}"))
        if values["mfu"] is not None:
            fields.append(("MFU", f"{values['mfu']:.1%}"))
        fields.append(("peak memory", format_size(values["memory_bytes"])))
    if state.checkpoint is not None:
        age = "resumed from it"
        if state.saved_at is not None:
            age = f"{duration(time.monotonic() - state.saved_at)} ago"
        fields.append(("checkpoint", f"step {state.checkpoint:,} ({age})"))
    return fields


def _packed(fields: list[tuple[str, str]], width: int) -> list[Text]:
    """Return the fields in as few lines as they fit in, in their order."""
    lines: list[Text] = []
    for name, value in fields:
        field = Text.assemble((f"{name} ", "dim"), value)
        if lines and lines[-1].cell_len + 2 + field.cell_len <= width:
            lines[-1].append("  ").append_text(field)
        else:
            lines.append(field)
    return lines


def _table(fields: list[tuple[str, str]]) -> list[Text]:
    return [Text.assemble((f"{name:<12}", "dim"), value) for name, value in fields]


def _beside(left: list[Text], right: list[Text], width: int) -> list[Text]:
    """Return two blocks of lines side by side, the left one ``width`` cells wide."""
    lines = []
    for index in range(max(len(left), len(right))):
        line = left[index] if index < len(left) else Text()
        line.truncate(width, pad=True)
        lines.append(line.append("  ").append_text(right[index]) if index < len(right) else line)
    return lines


def _bar_line(state: LiveState, width: int, ascii_only: bool) -> Text:
    """Return one line: steps, a bar, elapsed time and time left."""
    share = state.step / state.total if state.total else 1.0
    start = f"step {state.step:,}/{state.total:,} "
    elapsed = duration(time.monotonic() - state.began)
    left = f"left {duration(state.seconds_left)}"
    end = f" {share:4.0%}  {elapsed}  {left}"
    if width < len(start) + len(end) + 8:
        end = f"  {left}"
    size = width - len(start) - len(end)
    full = round(share * size)
    if size < 4:  # no room for a bar
        return Text(f"{start} {left}")
    done, rest = ("#", "-") if ascii_only else ("━", "─")
    return Text.assemble(start, (done * full, "green"), (rest * (size - full), "dim"), end)


def _sample_lines(sample: str | None, most: int, ascii_only: bool) -> list[Text]:
    """Return the first lines of a sample, or all of it in one line."""
    if sample is None:
        return []
    text = sample.strip("\n")[:_MOST_SAMPLE]
    if ascii_only:
        text = text.encode("ascii", "backslashreplace").decode()
    lines = text.split("\n")
    shown = lines[:most] if most > 1 else [(" / " if ascii_only else " ⏎ ").join(lines)]
    return [Text.assemble(("| ", "dim"), printable(line.expandtabs(4))) for line in shown]


def history_line(values: dict[str, Any], width: int) -> str:
    """Return a logged step for the history above the view: what fits in one line.

    Args:
        values: the step's line of metrics.jsonl.
        width: of the terminal, in cells.
    """
    parts = [
        f"step {values['step']}",
        f"loss {values['loss']:.4f}",
        f"lr {values['lr']:.2e}",
        f"grad norm {values['grad_norm']:.3f}",
        f"{values['tokens_per_second']:,.0f} tok/s",
    ]
    if values["mfu"] is not None:
        parts.append(f"MFU {values['mfu']:.1%}")
    line = parts[0]
    for part in parts[1:]:
        if len(line) + 2 + len(part) >= width:
            break
        line += f"  {part}"
    return line
