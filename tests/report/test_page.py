"""What a report's page says, and how large it is."""

import html
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minigpt_cli.data.dataset_manifest import read_dataset_manifest
from minigpt_cli.report.curves import AXES, TRAINED
from minigpt_cli.report.numbers import numbers_of
from minigpt_cli.report.page import ASSETS, MARKER, MARKER_WITHIN
from minigpt_cli.report.run_contents import read_run
from tests.helpers.processes import ROOT
from tests.helpers.report_runs import data_of, page_of, write_lines, write_run

OLD = ROOT / "tests/data/old"


def text_of(page: str) -> str:
    """The page's text, as a person reads it."""
    body = page.partition("<body>")[2].partition('<script type="application/json"')[0]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def test_everything_is_there(tmp_path: Path):
    page = page_of(write_run(tmp_path / "runs/one"))
    text = text_of(page)
    for said in (
        "step 100 of 200", "tokens 25,600", "training time 0:50", "MFU (median) 30.0%",
        "peak memory 2.0 GB", "best validation loss 2.3140 at 100",
        "41 spike loss 9.5 is above 4.25, 2 steps were skipped 2026-11-24T18:51:58+0000",
        "44 rollback rolled back to step 40; the data in between is skipped",
        "train-00000.npy, offset 96: a b c",
        "Prompt To be step 100 To be or not 100", "step 10 To be or not 10",
        "[optimizer] lr 0.003 command line name adamw default", "warmup_steps 3 recipe",
        "torch 2.13.0",
        "path data/tiny state not here: there is no such dataset in ",
    ):  # fmt: skip
        assert said in text, said
    (data,) = data_of(page)
    assert data["name"] == "one"
    assert data["training"]["axes"]["seconds"][:2] == [0.5, 1]
    assert data["training"]["curves"]["loss"]["mean"][-1] == pytest.approx(2.21404, abs=1e-5)
    assert len(data["validation"]["curves"]["val_loss"]["mean"]) == 10
    marks = [(mark["kind"], mark["step"], mark["tokens"], mark["seconds"])
             for mark in data["marks"]]  # fmt: skip
    assert marks == [
        ("spike", 41, 41 * 256, 20.5), ("spike", 43, 43 * 256, 21.5),
        ("rollback", 44, 44 * 256, 22),
    ]  # fmt: skip


def test_advice_for_clip_norm(tmp_path: Path):
    """Norms of 0.5 to 1.4 in turn, with numpy as the oracle."""
    run = write_run(tmp_path / "one", settings=("schedule.warmup_steps=0", "optimizer.clip_norm=1"))
    clip = numbers_of(read_run(run, "one")).clip
    norms = [0.5 + (step % 10) / 10 for step in range(1, 101)]
    assert clip is not None
    assert [clip.p90, clip.p95] == pytest.approx(np.percentile(norms, [90, 95]))
    assert clip.clipped == 0.4
    assert clip.text == (
        "90% of the logged gradient norms are below 1.31, 95% below 1.4. clip_norm = 1 clipped "
        "40.0% of the logged steps: a clip_norm from 1.3 to 1.4 clips only the 5% to 10% largest."
    )
    assert clip.text in text_of(page_of(run))
    for settings, said in (
        (("schedule.warmup_steps=30",), "gradient norms after warmup (step 30) are"),
        (("schedule.warmup_steps=95",), "gradient norms are"),  # too few are left
        (("optimizer.clip_norm=0",), "Nothing is clipped (clip_norm = 0): a clip_norm from"),
    ):
        other = write_run(tmp_path / said[:30], settings=settings)
        assert said in text_of(page_of(other))


def test_runs_of_93d8a84(tmp_path: Path):
    runs = [shutil.copytree(OLD / "runs" / name, tmp_path / "runs" / name)
            for name in ("adamw", "base", "chat", "lora", "muon")]  # fmt: skip
    page = page_of(*map(Path, runs))
    for data in data_of(page):
        assert {*data["training"]["axes"]} == {"step", "tokens"}
        assert {*data["training"]["curves"]} == {"loss", "lr", "grad_norm", "tokens_per_second"}
    text = text_of(page)
    assert "stopped by SIGTERM at step 7 of 30" in text
    assert "optimizer.name adamw adamw adamw adamw muon" in text
    assert "optimizer.lr 0.001 0.01 0.01 0.001 0.001" in text
    assert "schedule.min_lr_ratio" not in text.partition("Curves")[0]  # the same in all
    assert "parameters saved 14,320 11,328 992 768 10,000" in text


def test_a_run_that_has_not_begun(tmp_path: Path):
    run = write_run(tmp_path / "one")
    (run / "metrics.jsonl").unlink()
    page = page_of(run)
    assert "No step was logged yet." in text_of(page)
    assert data_of(page)[0]["marks"] == []


def test_two_equal_recipes(tmp_path: Path):
    page = page_of(write_run(tmp_path / "a"), write_run(tmp_path / "b"))
    assert "Differences of the recipes All settings are the same." in text_of(page)


def test_losses_that_are_no_number(tmp_path: Path):
    run = write_run(tmp_path / "one")
    losses = [1.0, None, 2.0]
    write_lines(run / "metrics.jsonl", [{"step": n, "loss": x} for n, x in enumerate(losses, 1)])
    page = page_of(run)
    assert data_of(page)[0]["training"]["curves"]["loss"]["mean"] == losses
    assert "losses that were no number 1" in text_of(page)


def test_epochs_of_the_dataset(tmp_path: Path, license_dataset: Path):
    run = write_run(tmp_path / "runs/one")
    shutil.copytree(license_dataset, tmp_path / "data/tiny")
    tokens = read_dataset_manifest(license_dataset).splits["train"].tokens
    write_lines(run / "metrics.jsonl", [{"step": 1, "loss": 1.0, "tokens": 3 * tokens}])
    assert "epochs so far 3.00" in text_of(page_of(run))
    write_lines(run / "metrics.jsonl", [{"step": 1, "loss": 1.0}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "epochs so far" not in text_of(page_of(run))


def test_numbers_beyond_reason(tmp_path: Path):
    run = write_run(tmp_path / "one")
    keys = ("time", *AXES[1:], *TRAINED)
    rows = [{"step": (1 << 53) - 1 - n} | dict.fromkeys(keys, value)
            for n, value in enumerate((1e308, -1e308, 1e99, -1e99, 0))]  # fmt: skip
    rows += [{"step": n} | dict.fromkeys(("val_loss", "tokens"), 1e308) for n in range(3)]
    write_lines(run / "metrics.jsonl", rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (data,) = data_of(page_of(run))
    assert data["training"]["curves"]["loss"]["mean"] == [0, -1e99, 1e99, None, None]


def test_size(tmp_path: Path):
    """Below 150 kB without the data, which the screen's pixels bound."""
    run = write_run(tmp_path / "one", steps=4)
    page = page_of(run).encode()
    assert len(page) < 150_000
    assert MARKER in page[:MARKER_WITHIN]
    rows: list[dict[str, Any]] = [
        {"step": step, "tokens": step, "loss": step / 7, "grad_norm": step / 3, "lr": step / 9}
        for step in range(1, 50_001)
    ]
    write_lines(run / "metrics.jsonl", rows)
    assert len(page_of(run)) < len(page) + 50_000 * 5
    names = {path.name for path in ASSETS.iterdir()}
    assert "uPlot.LICENSE.txt" in names
    assert (ASSETS / "uPlot.LICENSE.txt").read_text() in page.decode()


def test_the_page_names_no_host(tmp_path: Path):
    page = page_of(write_run(tmp_path / "one"))
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"')]*", page))
    assert addresses == {"https://github.com/leeoniya/uPlot"}  # in comments


def test_names_that_are_no_text(tmp_path: Path):
    run = write_run(tmp_path / os.fsdecode(b"na\xffme\n<b>"))
    page = page_of(run)
    page.encode()
    assert data_of(page)[0]["name"] == r"na\udcffme\x0a<b>"
    assert "na\\udcffme\n&lt;b&gt;" in page
