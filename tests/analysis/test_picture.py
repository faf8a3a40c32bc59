"""A curve as characters, and the cases where there is none."""

import io
import sys

import pytest

from minigpt_cli.analysis.picture import draw_curve

TICKS = ([0.0, 2.0], ["start", "end"])


def test_no_picture_where_the_output_cannot_show_it(monkeypatch: pytest.MonkeyPatch):
    def drawn(encoding: str) -> str | None:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        return draw_curve([0, 1, 2], [3, 1, 2], 60, TICKS)

    picture = drawn("utf-8")
    assert picture is not None
    assert picture.splitlines()[-1].split() == ["start", "end"]
    assert max(map(len, picture.splitlines())) == 60
    assert drawn("ascii") is None
