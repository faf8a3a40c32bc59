"""The results of benchmarks, and the table and the plots that are made of them."""

import json
import math
import re
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks import table
from benchmarks.nanogpt_shakespeare import read_log
from benchmarks.plots import draw_all
from benchmarks.results import FOLDER, Row, read_results, write_results
from benchmarks.shapes import TOKENS, product_flops, shape
from minigpt_cli.model.cost import parameter_count
from tests.helpers.processes import ROOT, environment

ROWS = [
    Row("gpt2", "minigpt", "eager", "ms", [[500.0, 529.4, 600.0], [531.0], [400.0]]),
    Row("gpt2", "minigpt", "compiled", "ms", [[506.0]]),
    Row("gpt2", "HF", "bf16", "ms", [[1076.0]]),
    Row("products", "limit", "2048 x 2048 x 2048", "GFLOP/s", [[743.0]]),
    Row("products", "limit", "1024 x 1024 x 1024", "GFLOP/s", [[700.0]]),
    Row("growth: ranks", "minigpt", "2", "s", [[0.5]]),
    Row("growth: ranks", "minigpt", "1", "s", [[0.25]]),
]
HEAD = {
    "machine": {"cores": 2, "cpu": "AMD EPYC", "flags": ["avx512_bf16"]},
    "versions": {"torch": "2.13.0", "litgpt": "0.5.13"},
    "date": "2026-11-29T22:00:00+00:00",
    "commit": "0123456789",
    "uncommitted_changes": False,
    "busy": False,
}


def test_the_readme_shows_the_results():
    page = (ROOT / "README.md").read_text()
    assert table.put(page, table.readme_table()) == page, "run make bench-table"


def test_table():
    assert table.table(HEAD, ROWS).splitlines() == [
        "Medians on 2 cores of an AMD EPYC (avx512_bf16), torch 2.13.0, litgpt 0.5.13, 2026-11-29, "
        "commit 0123456. Every sample: benchmarks/results.",
        "",
        "| work | minigpt | nanoGPT | litgpt | HF | limit |",
        "|---|---|---|---|---|---|",
        "| gpt2, 12.3 M, 16 x 256: ms per step | 529 eager; 506 compiled | not measured |  | "
        "1,076 bf16 | 424 products at 743 GFLOP/s |",
        "",
        "![The time of a training step, by program](docs/images/bench-steps.svg)",
        "",
        "![The cost of a step against sizes](docs/images/bench-growth.svg)",
    ]


def test_a_busy_machine_is_told():
    words = table.describe(HEAD | {"busy": True, "uncommitted_changes": True})
    assert "The machine was busy" in words
    assert "with uncommitted changes" in words


def test_round_trip(tmp_path: Path):
    file = tmp_path / "results" / "x.json"
    write_results(file, ROWS, busy=True, peer_python=None)
    head, rows = read_results(file)
    assert rows == ROWS
    assert head["busy"] is True
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    assert head["commit"] == commit
    pages = re.search(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())
    assert pages is not None
    assert head["machine"]["memory_bytes"] == 1024 * int(pages[1])
    assert head["versions"]["torch"].startswith("2.")


def test_results_have_every_sample():
    for file in sorted(FOLDER.glob("bench*.json")):
        head, rows = read_results(file)
        assert {"machine", "versions", "commit", "threads", "date"} <= head.keys()
        for row in rows:
            assert row.samples, row
            assert all(row.samples), row
            assert all(math.isfinite(each) for process in row.samples for each in process), row


def test_other_files_beside_the_results_are_not_shown(tmp_path: Path):
    write_results(tmp_path / "bench.json", ROWS, busy=False, peer_python=None)
    before = table.readme_table(tmp_path)
    (tmp_path / "gpu-nvidia-h200.json").write_text('{"format": "minigpt-gpu-check-1"}')
    assert table.readme_table(tmp_path) == before
    with pytest.raises(AssertionError, match="gpu-nvidia-h200"):
        read_results(tmp_path / "gpu-nvidia-h200.json")


def test_two_measurements_have_their_own_words(tmp_path: Path):
    for name, rows in (("bench", ROWS[:5]), ("bench-full", ROWS[5:])):
        write_results(tmp_path / f"{name}.json", rows, busy=False, peer_python=None)
    full = tmp_path / "bench-full.json"
    day = json.loads(full.read_text())["date"][:10]
    same = table.readme_table(tmp_path)
    full.write_text(full.read_text().replace(day, "2026-01-31"))
    found = table.readme_table(tmp_path)
    assert found.startswith(f"{same}\n\nWhole runs, and the cost against sizes: Medians on ")
    assert "2026-01-31" in found.removeprefix(same)


def test_bench_train_gives_every_step():
    words = ["--hidden", "16", "--layers", "1", "--heads", "2", "--vocab", "128", "--batch", "2"]
    done = subprocess.run(
        [sys.executable, "benchmarks/bench_train.py", *words, "--sequence-length", "8",
         "--steps", "5"],
        cwd=ROOT, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["step_seconds"]) == 5
    assert statistics.median(found["step_seconds"]) == found["median_step_seconds"]


def test_the_limit_counts_each_product():
    """By hand: gpt2's matrices, and half of the scores and of the weighted values."""
    width, layers, vocab = 384, 6, 4096
    matrices = layers * 12 * width**2 + vocab * width
    seen = (TOKENS + 1) / 2  # keys that a query sees, on average
    attention = layers * 2 * width * seen
    by_hand = 3 * 2 * (matrices + attention)
    assert product_flops(shape("gpt2"), TOKENS) == pytest.approx(by_hand, rel=5e-3)
    assert f"{parameter_count(shape('gpt2')) / 1e6:.1f}" == "12.3"
    assert f"{parameter_count(shape('llama')) / 1e6:.1f}" == "13.8"


def test_nanogpts_log():
    log = """number of parameters: 0.80M
step 0: train loss 4.1676, val loss 4.1649
iter 0: loss 4.1828, time 9000.00ms, mfu -100.00%
iter 1: loss 4.1373, time 30.00ms, mfu -100.00%
iter 2: loss 4.1347, time 50.00ms, mfu -100.00%
step 3: train loss 1.8, val loss 1.3863
iter 3: loss 4.1373, time 7000.00ms, mfu -100.00%
"""
    found = read_log(log)
    assert found.seconds == pytest.approx(4 * 0.040)
    assert found.bits_per_byte == pytest.approx(2.0, abs=1e-4)  # ln 4


def test_plots(tmp_path: Path):
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        draw_all(ROWS, folder)
        assert {file.name for file in folder.iterdir()} == {"bench-steps.svg", "bench-growth.svg"}
    for name in ("bench-steps.svg", "bench-growth.svg"):
        svg = (tmp_path / "a" / name).read_text()
        assert svg == (tmp_path / "b" / name).read_text()
        # Only greys and blues that stand out from white and from black, and no background.
        fills = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svg))
        assert fills <= {"#767676", "#1f77d0"}
        words = "".join(ElementTree.fromstring(svg).itertext())
        assert ("gpt2: minigpt, eager" in words) == (name == "bench-steps.svg")


def test_the_file_has_a_line_for_each_row(tmp_path: Path):
    write_results(tmp_path / "x.json", ROWS, busy=False, peer_python=None)
    text = (tmp_path / "x.json").read_text()
    assert len(json.loads(text)["rows"]) == sum('"work"' in line for line in text.splitlines())
