"""What a person sees on a terminal."""

import re

import pytest

from minigpt_cli.core.console import console
from minigpt_cli.report.live import TrainingDisplay


@pytest.fixture(autouse=True)
def new_console():
    """The console looks at the terminal once, when it is made."""
    console.cache_clear()
    yield
    console.cache_clear()


@pytest.mark.parametrize("columns", ["60", "80", "160"])
def test_all_numbers_fit_on_a_terminal(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes it for a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", columns)
    values = {"step": 123_450, "loss": 2.34567, "lr": 3e-4, "grad_norm": 0.512,
              "tokens_per_second": 1_234_567.0, "mfu": 0.412}  # fmt: skip
    with TrainingDisplay(200_000, 0) as display:
        display.step(values, 3 * 3600 + 61)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]", " ", capsys.readouterr().err)
    shown = " ".join(shown.split())
    for part in ("step 123450/200000", "loss 2.3457", "lr 3.00e-04", "grad norm 0.512",
                 "1,234,567 tok/s", "MFU 41.2%", "left 3:01:01"):  # fmt: skip
        assert part in shown
    assert ("━" in shown) == (columns == "160")
