"""The curve on a terminal, compared with NumPy's interpolation."""

import math

import numpy as np
import pytest

from minigpt_cli.report.curve import Point, curve_lines, thin

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def dots_of(lines: list[str], margin: int) -> list[tuple[int, int]]:
    """(row, column) of each Braille dot of the canvas, after Unicode's numbering."""
    found = []
    for row, line in enumerate(lines):
        for column, character in enumerate(line[margin:]):
            bits = ord(character) - 0x2800 if character > "\u2800" else 0
            found += [(4 * row + y, 2 * column + x) for y in range(4) for x in range(2)
                      if bits & DOTS[y][x]]  # fmt: skip
    return found


def test_line_is_where_numpy_puts_it():
    rng = np.random.default_rng(0)
    steps = np.arange(1, 60, 3)
    losses = 3 + rng.random(len(steps))
    points = list(zip(steps.tolist(), losses.tolist(), strict=True))
    lines = [line.plain for line in curve_lines(points, [], 70, 14, ascii_only=False)]
    assert len(lines) == 14
    margin = lines[0].index("┤") + 1
    assert lines[-2][margin - 1 :].startswith("└┬")
    top, bottom = (float(lines[row].split("┤")[0]) for row in (0, 9))
    width = 2 * (70 - margin)
    found = dots_of(lines[:12], margin)
    columns = sorted({column for _, column in found})
    assert columns == list(range(width))  # without gaps
    per_dot = (top - bottom) / (9 * 4 * (47 / 44) / 1.0)  # labels stand on rows 0 and 9 of 12
    slope = np.abs(np.gradient(np.interp(np.linspace(1, 58, width), steps, losses))).max()
    for row, column in found:
        step = 1 + 57 * column / (width - 1)
        expected = np.interp(step, steps, losses)
        shown = top - row * per_dot
        assert abs(shown - expected) < 2 * per_dot + slope + 0.01


def test_marks_labels_and_ascii():
    losses = [(step, 5 - step / 100) for step in range(0, 101, 10)]
    text = curve_lines(losses, [(100, 4.0), (50, 4.5)], 60, 11, ascii_only=False)
    assert sum(line.plain.count("●") for line in text) == 2
    assert text[-1].plain.split() == ["0", "50", "100"] or text[-1].plain.split()[0] == "0"
    assert all(line.cell_len <= 60 for line in text)
    ascii_text = "\n".join(
        line.plain for line in curve_lines(losses, [(50, 4.5)], 60, 11, ascii_only=True)
    )
    assert ascii_text.isascii()
    assert ascii_text.count("o") == 1
    assert ascii_text.count("*") > 30


@pytest.mark.parametrize(
    "losses",
    [
        [(0, 3.0)],
        [(5, 3.0), (5, 3.0)],
        [(1, 1e300), (2, -1e300), (3, 1e-300)],
        [(step, 2.0) for step in range(50)],
        [(10**15, 2.0), (10**16, 3.0)],
        [(3, 1.0), (2, 2.0), (1, 3.0)],
    ],
)
@pytest.mark.parametrize(("width", "height"), [(40, 5), (79, 11), (200, 18)])
def test_any_points_fill_the_area(losses: list[Point], width: int, height: int):
    for points in ((losses, []), ([], losses), (losses, losses)):
        lines = curve_lines(*points, width, height, ascii_only=False)
        assert len(lines) == height
        assert all(line.cell_len <= width for line in lines)


def test_early_fall_does_not_flatten_the_rest():
    losses = [(step, 10.0 if step < 5 else 2.0 + math.sin(step) / 10) for step in range(100)]
    lines = curve_lines(losses, [], 79, 11, ascii_only=False)
    assert float(lines[0].plain.split("┤")[0]) < 2.2


def test_thinning_keeps_every_extreme():
    rng = np.random.default_rng(1)
    points = [(step, float(loss)) for step, loss in enumerate(rng.random(1000))]
    points[500] = (500, 99.0)
    points[501] = (501, -99.0)
    few = thin(points, 100)
    assert len(few) <= 100
    assert few == sorted(few)
    assert set(few) <= set(points)
    assert {(500, 99.0), (501, -99.0)} <= set(few)
    assert thin(points, 2000) == points
