"""The live view's lines at many sizes, and what it keeps of a run."""

import math

import pytest

from minigpt_cli.report.live_layout import history_line, view_lines
from minigpt_cli.report.live_state import LiveState

VALUES = {
    "step": 123_450, "tokens": 1, "loss": 2.34567, "lr": 3e-4, "grad_norm": 0.512,
    "tokens_per_second": 1_234_567.0, "mfu": 0.412, "seconds": 1.0, "memory_bytes": 78_400_000_000,
}  # fmt: skip


def state_of(**changes: object) -> LiveState:
    state = LiveState(total=200_000, clip_norm=1.0, step=123_450, seconds_left=3 * 3600 + 61)
    for step in range(50, 123_450, 50):
        state.add({"step": step, "loss": 2 + 1000 / step, "grad_norm": 0.5 + (step % 200 == 0)})
    state.add({"step": 50_000, "val_loss": 2.4})
    state.add({"step": 100_000, "val_loss": 2.5})
    state.values = VALUES | changes
    state.note_save(123_000)
    state.sample = "def f(\x1b[2Jx):\n\treturn '鱼鱼鱼'\n" * 30
    return state


@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize("height", [1, 2, 3, 6, 12, 24, 50])
@pytest.mark.parametrize("width", [1, 10, 40, 60, 80, 119, 121, 200, 400])
def test_it_fits_every_terminal(width: int, height: int, ascii_only: bool):
    for state in (state_of(), LiveState(10, 1.0)):
        lines = view_lines(state, width, height, ascii_only=ascii_only)
        assert len(lines) < height or height == len(lines) == 0
        assert all(line.cell_len < width or not line.plain for line in lines)
        assert "\x1b" not in "".join(line.plain for line in lines)
        assert not ascii_only or all(line.plain.isascii() for line in lines)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 30), (200, 50)])
def test_all_numbers_are_there(width: int, height: int):
    lines = [line.plain for line in view_lines(state_of(), width, height, ascii_only=False)]
    text = "\n".join(lines)
    for part in ("loss 2.3457", "validation 2.5000 (best 2.4000 at step 50,000)", "3.00e-04",
                 "0.512", "25% of logged steps", "1,234,567", "41.2%", "78.4 GB",
                 "step 123,000 (0:00 ago)", "left 3:01:01", " 62%", "| def f("):  # fmt: skip
        assert part in text
    (bar,) = (line for line in lines if "━" in line)
    assert bar.startswith("step 123,450/200,000 ━")
    assert len(bar) == width - 1


def test_what_is_not_known_is_left_out():
    lines = view_lines(state_of(mfu=None), 80, 24, ascii_only=False)
    assert "MFU" not in "".join(line.plain for line in lines)
    state = state_of()
    state.clip_norm = 0.0
    assert "clipped" not in "".join(x.plain for x in view_lines(state, 80, 24, ascii_only=False))
    (first,) = (x.plain for x in view_lines(LiveState(10, 0.0), 80, 24, ascii_only=False)[1:2])
    assert first == "waiting for the first logged step"


def test_history_line_fits():
    assert history_line(VALUES, 200) == (
        "step 123450  loss 2.3457  lr 3.00e-04  grad norm 0.512  1,234,567 tok/s  MFU 41.2%"
    )
    assert len(history_line(VALUES, 80)) < 80
    assert history_line(VALUES, 30) == "step 123450  loss 2.3457"
    assert "loss nan" in history_line(VALUES | {"loss": math.nan}, 80)


def test_restart_takes_what_is_sound_in_the_files():
    state = state_of()
    lines: list[dict[str, object]] = [
        {"step": 1, "loss": 5.0, "grad_norm": 2.0},
        {"step": 2, "loss": None, "grad_norm": None},
        {"step": 3, "loss": "x", "grad_norm": True},
        {"step": 4, "loss": 10**400, "grad_norm": [1]},
        {"step": -(10**30), "loss": 1.0},
        {"step": 5, "loss": 4.0, "grad_norm": 0.5},
        {"step": 5, "val_loss": 4.5},
        {"step": 6, "loss": 3.0, "grad_norm": 0.5},
    ]
    state.restart(5, lines, [{"step": 5, "prompt": "a", "completion": "b"}, {"completion": 3}])
    assert state.losses == [(1, 5.0), (5, 4.0)]
    assert state.validation == [(5, 4.5)]
    assert state.best == (5, 4.5)
    assert (state.clipped, state.norms) == (1, 2)
    assert (state.checkpoint, state.saved_at, state.sample) == (5, None, None)
    state.restart(5, [], [{"step": 5, "prompt": "a", "completion": "b"}])
    assert state.sample == "ab"
