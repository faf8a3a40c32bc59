import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.helpers.processes import command, environment, family, fork, fresh


def test_json_without_a_compiler(tmp_path: Path):
    place = tmp_path / "place"
    place.mkdir()
    output = tmp_path / "output"
    process = fork(tmp_path / "log", "doctor", "--json", output=output, cwd=place, PATH="/nowhere",
                   TMPDIR=str(place))  # fmt: skip
    assert process.wait(300) == 0, process.tail
    result = json.loads(output.read_text())
    assert result["ready"] is True
    found = {each["what"]: each for each in result["findings"]}
    compiler = found["compiler"]
    assert (compiler["state"], compiler["found"]) == (
        "lacks", "torch.compile finds no C++ compiler"
    )  # fmt: skip
    assert compiler["mend"].endswith("apt-get install g++")
    assert found["disk here"]["state"] == "ok"
    assert (tmp_path / "log").read_text() == ""
    assert list(place.iterdir()) == []


def test_torch_that_can_not_be_imported(tmp_path: Path):
    """Also the table: it fits the terminal, and its commands are whole."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise ImportError('libcudart.so.12: no [file]')")
    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    for columns in (80, 200):
        done = subprocess.run(
            command("doctor"), env=environment() | {"PYTHONPATH": path, "COLUMNS": str(columns)},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("minigpt: training is not possible here: torch can't be imported")
        table, commands = done.stdout.split("\n\n")
        assert max(map(len, table.splitlines())) <= columns
        assert "libcudart.so.12: no" in table
        assert f"{sys.executable} -m pip install --force-reinstall 'torch>=2.11'" in commands or (
            "    pip install --force-reinstall 'torch>=2.11'" in commands
        )


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path):
    process = fresh(tmp_path / "log", "doctor", TMPDIR=str(tmp_path))
    while len(family(process)) < 2:  # until the compilation runs
        assert process.code is None, process.tail
        time.sleep(0.02)
    process.send(signal.SIGINT)
    assert process.wait() == 130  # and waits for its family
    assert process.said.splitlines() == ["minigpt: stopped by SIGINT"]
    assert [each.name for each in tmp_path.iterdir()] == ["log"]
