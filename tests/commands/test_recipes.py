import json
from pathlib import Path

import pytest

from tests.helpers.commands import finished, refused
from tests.helpers.processes import ROOT, minigpt

NAMES = sorted(file.stem for file in (ROOT / "recipes").glob("*.toml"))


def test_list(tmp_path: Path):
    lines = finished("recipes", cwd=tmp_path).splitlines()
    assert [line.split()[0] for line in lines[1:-2]] == NAMES
    assert max(map(len, lines)) <= 80
    (line,) = [line for line in lines if line.startswith("gpt2-124m ")]
    assert line.split() == ["gpt2-124m", "gpt2", "124M", "2.5B", "1", "H100", "(80", "GB)", "~1.5",
                            "hours"]  # fmt: skip
    found = json.loads(finished("recipes", "--json"))["recipes"]
    assert [each["name"] for each in found] == NAMES
    (tiny,) = [each for each in found if each["name"] == "tiny"]
    assert (tiny["trains"], tiny["parameters"], tiny["tokens"]) == ("qwen3", 4_197_632, 2_048_000)


@pytest.mark.parametrize("name", ["tiny", "gpt2-1.5b"])
def test_printed_byte_for_byte(name: str):
    done = minigpt("recipes", name)
    assert done.stdout == (ROOT / f"recipes/{name}.toml").read_text()
    assert done.stderr == ""
    as_json = json.loads(finished("recipes", name, "--json"))
    assert as_json["text"] == done.stdout
    assert as_json["file"] == str(ROOT / f"recipes/{name}.toml")


def test_files_that_a_recipe_names():
    done = minigpt("recipes", "shakespeare-lora")
    assert done.returncode == 0
    assert str(ROOT / "recipes") in done.stderr


def test_unknown():
    refused(2, "gpt2-124: no such recipe; did you mean gpt2-124m", "recipes", "gpt2-124")
