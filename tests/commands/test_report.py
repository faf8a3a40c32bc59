"""``minigpt report`` as a user types it."""

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.commands import finished, refused
from tests.helpers.processes import ROOT, minigpt
from tests.helpers.report_runs import data_of, write_run

OLD = ROOT / "tests/data/old/runs/base"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    write_run(tmp_path / "runs/one")
    shutil.copytree(OLD, tmp_path / "runs/old")
    return tmp_path


def test_one_run(work: Path):
    said = finished("report", "runs/one", cwd=work)
    assert said.startswith("runs/one/report.html: 1 run, ")
    page = work / "runs/one/report.html"
    first = page.read_text()
    assert data_of(first)[0]["name"] == "one"
    # A run that goes on is reported again and again.
    (work / "runs/one/status.json").write_text('{"status": "stopped"}')
    finished("report", "runs/one", cwd=work)
    assert page.read_text() != first
    assert {path.name for path in page.parent.iterdir() if path.name.startswith(".")} == set()


def test_several_runs(work: Path):
    refused(2, "2 runs make one page: say where, with -o page.html", "report", "runs/one",
            "runs/old", cwd=work)  # fmt: skip
    said = json.loads(finished("report", "runs/one", "runs/old", "-o", "page.html", "--json",
                               cwd=work))  # fmt: skip
    assert said["page"] == "page.html"
    assert said["png"] is None
    one, old = said["runs"]
    assert (one["run"], one["status"], one["step"], one["total_steps"]) == (
        "runs/one", "finished", 100, 200,
    )  # fmt: skip
    assert (one["incidents"], one["rollbacks"], one["best_step"]) == (2, 1, 100)
    assert one["clip"]["p90"] == pytest.approx(1.34)
    assert old["checkpoints"] == [10]
    assert old["seconds"] is None
    names = [run["name"] for run in data_of((work / "page.html").read_text())]
    assert names == ["one", "old"]


def test_nothing_else_is_overwritten(work: Path):
    mine = work / "mine.html"
    mine.write_text("<html>mine</html>")
    said = (
        "mine.html: exists, and minigpt report did not make it: choose another file, or delete it"
    )
    refused(2, f"-o {said}", "report", "runs/one", "-o", "mine.html", cwd=work)
    refused(2, f"--png {said}", "report", "runs/one", "--png", "mine.html", cwd=work)
    same = ("-o", "x.html", "--png", "./x.html")
    refused(2, "--png x.html: is the page's file", "report", "runs/one", *same, cwd=work)
    refused(2, "recipe.toml: exists", "report", "runs/one", "-o", "runs/one/recipe.toml", cwd=work)
    assert mine.read_text() == "<html>mine</html>"
    assert not (work / "runs/one/report.html").exists()
    for given, part in (
        ("runs", "-o runs: is a directory; name a file in it"),
        ("no/page.html", "-o no/page.html: there is no directory no; make it first"),
        ("/dev/null", "/dev/null: is not a regular file"),
    ):
        refused(2, part, "report", "runs/one", "-o", given, cwd=work)
    (work / "link.html").symlink_to("nowhere")
    refused(2, "is a link to nothing", "report", "runs/one", "-o", "link.html", cwd=work)
    refused(2, "runs: is no run, but 2 are in it", "report", "runs", cwd=work)


def test_png(work: Path):
    pytest.importorskip("matplotlib")
    image = work / "a.png"
    image.write_bytes(b"\x89PNG...tEXtSoftware\0minigpt report, an older one")  # is replaced
    said = finished("report", "runs/one", "--png", "a.png", cwd=work)
    assert [line.split(":")[0] for line in said.splitlines()] == ["runs/one/report.html", "a.png"]
    assert image.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_what_is_left_out_is_told(work: Path):
    (work / "runs/one/environment.json").write_text("{")
    done = minigpt("report", "runs/one", cwd=work)
    assert done.returncode == 0
    assert "left out: runs/one/environment.json: can't be read" in done.stderr


def test_a_status_that_cannot_be_read(work: Path):
    (work / "runs/one/status.json").write_text("{}")
    assert finished("report", "runs/one", "-o", "page.html", cwd=work).startswith("page.html: ")
