"""The image of ``report --png``."""

import struct
import warnings
from pathlib import Path

import pytest

from minigpt_cli.report.run_contents import RunContents, read_run, runs_by_name
from tests.helpers.report_runs import write_run

pytest.importorskip("matplotlib")


def contents(*runs: Path) -> list[RunContents]:
    return [read_run(path, name) for name, path in runs_by_name([*runs]).items()]


def test_png(tmp_path: Path):
    from minigpt_cli.report.figure import PNG_MARKER, PNG_MARKER_WITHIN, render_png

    odd = "_$\\frac{ 名前"  # no formula, not left out of the legend, perhaps without glyphs
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / odd, lr=1e-3)
    images = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for runs in ((one,), (one, two)):
            image = render_png(contents(*runs))
            assert image.startswith(b"\x89PNG\r\n\x1a\n")
            assert PNG_MARKER in image[:PNG_MARKER_WITHIN]
            width, height = struct.unpack(">II", image[16:24])
            assert (width, height) == (1430, 910)
            images.append(image)
    assert images[0] != images[1]
    (one / "metrics.jsonl").unlink()
    render_png(contents(one))
