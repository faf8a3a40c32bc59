"""A curve as a picture of characters, drawn by plotext."""

import sys
from collections.abc import Sequence

_LEAST_WIDTH, _MOST_WIDTH, _HEIGHT = 40, 100, 15  # characters, characters, lines
Ticks = tuple[Sequence[float], Sequence[str]]


def draw_curve(
    x: Sequence[float],
    y: Sequence[float],
    width: int,
    x_ticks: Ticks,
    y_ticks: Ticks | None = None,
    mark: float | None = None,
) -> str | None:
    """Return a curve as lines of characters; None where it can't be drawn or printed.

    Args:
        x, y: at least two points, x rising.
        width: columns of the terminal.
        x_ticks, y_ticks: places on the axis and their names; plotext's choice without them.
        mark: where to draw a vertical line.
    """
    try:
        import plotext
    except ImportError:
        return None
    figure = plotext.figure
    plotext.terminal.limit(False, False)
    figure.clear()
    figure.theme("colorless")
    figure.plot_size(min(max(width, _LEAST_WIDTH), _MOST_WIDTH), _HEIGHT)
    if mark is not None:
        figure.line(mark, "vertical", style="dotted")
    figure.draw(figure.signal(list(x), list(y), marker="braille").lines())
    for axis, ticks in (("x", x_ticks), ("y", y_ticks)):
        if ticks is not None:
            figure.ruler(axis).ticks(*map(list, ticks))
    picture: str = figure.build().string(colorless=True)
    try:
        picture.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return None
    return "\n".join(line.rstrip() for line in picture.rstrip("\n").splitlines())
