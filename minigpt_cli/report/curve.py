"""The losses of a run as a curve made of characters.

A library would do, but this runs inside a training process: plotext 6.1 draws in C++, and a failed
assertion there aborts the process (benchmarks/LOG.md).
"""

import itertools
import math
from dataclasses import dataclass, field

from rich.text import Text

LOSS_STYLE, VALIDATION_STYLE = "cyan", "yellow"
LOSS_MARK, VALIDATION_MARK = "──", "●"
ASCII_LOSS_MARK, ASCII_VALIDATION_MARK = "--", "o"

_ASCII_AXES = str.maketrans("┤│└┬─", "||++-")
_BRAILLE = 0x2800  # the character without dots
_DOT_BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # by row and column

Point = tuple[int, float]
"""A step and a loss."""


def thin(points: list[Point], most: int) -> list[Point]:
    """Return at most ``most`` of the points: the lowest and the highest of each group.

    Args:
        points: in the order of their steps.
        most: at least 2.
    """
    if len(points) <= most:
        return points
    groups = most // 2
    kept: list[Point] = []
    for group in range(groups):
        part = points[group * len(points) // groups : (group + 1) * len(points) // groups]
        kept += sorted({min(part, key=_loss), max(part, key=_loss)})
    return kept


def curve_lines(
    losses: list[Point], validation: list[Point], width: int, height: int, *, ascii_only: bool
) -> list[Text]:
    """Draw losses as a line and validation losses as dots.

    The vertical axis fits the last nine tenths of the steps, so that the fall at the start doesn't
    flatten the rest.

    Args:
        losses, validation: in the order of their steps, finite; together not empty.
        width, height: of the result, in cells.
        ascii_only: whether the terminal shows nothing else.

    Returns:
        ``height`` lines.
    """
    points = losses + validation
    first, last = min(points)[0], max(points)[0]
    last = max(last, first + 1)
    low, high = _range(points, first, last)
    labels = _loss_labels(low, high, height - 2)
    margin = max(map(len, labels.values()))
    canvas = _Canvas(width - margin - 1, height - 2, (first, last), (low, high))
    canvas.draw_line(thin(losses, 2 * canvas.width), ascii_only)
    canvas.draw_dots(
        thin(validation, canvas.width), ASCII_VALIDATION_MARK if ascii_only else VALIDATION_MARK
    )
    axis, steps = _step_axis(canvas, margin)
    lines = []
    for row in range(canvas.height):
        label = f"{labels.get(row, ''):>{margin}}{'┤' if row in labels else '│'}"
        line = Text(label.translate(_ASCII_AXES) if ascii_only else label)
        lines.append(line.append_text(canvas.row(row)))
    return [*lines, Text(axis.translate(_ASCII_AXES) if ascii_only else axis), Text(steps)]


def _loss(point: Point) -> float:
    return point[1]


@dataclass
class _Canvas:
    """The area between the axes.

    Attributes:
        width, height: in cells.
        steps, range: the first and the last step, the lowest and the highest loss.
        line: (row, column) -> the character of the line there.
        dots: (row, column) -> the character of a validation loss.
    """

    width: int
    height: int
    steps: tuple[int, int]
    range: tuple[float, float]
    line: dict[tuple[int, int], str] = field(default_factory=dict)
    dots: dict[tuple[int, int], str] = field(default_factory=dict)

    def place(self, point: Point, columns: int, rows: int) -> tuple[float, float]:
        """Return the row and column of a point on a grid over the canvas.

        The row of a loss out of range is just outside.
        """
        (first, last), (low, high) = self.steps, self.range
        column = (point[0] - first) / (last - first) * (columns - 1)
        row = (high - point[1]) / (high - low) * (rows - 1)
        return min(max(row, -1.0), float(rows)), column

    def draw_line(self, points: list[Point], ascii_only: bool) -> None:
        """Connect the points: with Braille characters, of 4 x 2 dots, or with asterisks."""
        rows, columns = (1, 1) if ascii_only else (4, 2)
        places = [self.place(p, columns * self.width, rows * self.height) for p in points]
        bits: dict[tuple[int, int], int] = {}
        for (row, column), (next_row, next_column) in itertools.pairwise(places[:1] + places):
            count = math.ceil(max(abs(next_row - row), abs(next_column - column), 1))
            for index in range(count + 1):
                y = round(row + (next_row - row) * index / count)
                x = round(column + (next_column - column) * index / count)
                cell = y // rows, x // columns
                bits[cell] = bits.get(cell, 0) | _DOT_BITS[y % rows][x % columns]
        self.line = {
            cell: "*" if ascii_only else chr(_BRAILLE + dots) for cell, dots in bits.items()
        }

    def draw_dots(self, points: list[Point], mark: str) -> None:
        """Put a mark at each point."""
        for point in points:
            row, column = self.place(point, self.width, self.height)
            self.dots[round(row), round(column)] = mark

    def row(self, row: int) -> Text:
        """Return one line of the canvas."""
        cells = [
            (mark, VALIDATION_STYLE)
            if (mark := self.dots.get((row, column)))
            else (self.line.get((row, column), " "), LOSS_STYLE)
            for column in range(self.width)
        ]
        runs = itertools.groupby(cells, key=lambda cell: cell[1])
        return Text.assemble(*(("".join(mark for mark, _ in run), style) for style, run in runs))


def _range(points: list[Point], first: int, last: int) -> tuple[float, float]:
    """Return the lowest and the highest loss to show, with some room."""
    late = [loss for step, loss in points if step - first > (last - first) / 10]
    low = min(loss for _, loss in points)
    high = max(late or [loss for _, loss in points])
    room = 0.05 * (high - low) or max(0.01 * abs(high), 1e-6)
    return low - room, high + room


def _loss_labels(low: float, high: float, rows: int) -> dict[int, str]:
    """Return row -> label."""
    digits = min(6, max(1, 2 - math.floor(math.log10(high - low))))
    form = f".{digits}f" if high < 1e5 else ".3g"
    return {row: f"{high - (high - low) * row / (rows - 1):{form}}" for row in range(0, rows, 3)}


def _step_axis(canvas: _Canvas, margin: int) -> tuple[str, str]:
    """Return the lines of the horizontal axis and of its labels."""
    first, last = canvas.steps
    count = min(max(2, canvas.width // 16), last - first + 1)
    axis = list("─" * canvas.width)
    labels = [" "] * (canvas.width + margin + 1)
    for index in range(count):
        column = round(index * (canvas.width - 1) / (count - 1))
        axis[column] = "┬"
        label = f"{round(first + (last - first) * column / (canvas.width - 1)):,}"
        start = margin + 1 + column - len(label) // 2
        start = min(max(start, 0), len(labels) - len(label))
        labels[start : start + len(label)] = label
    return " " * margin + "└" + "".join(axis), "".join(labels)
