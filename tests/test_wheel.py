"""The wheel holds the whole package, and works where there is no checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from minigpt_cli import __version__
from tests.helpers.processes import ROOT


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--no-deps", "--no-index"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing appears in the checkout."""
    # Not imported: it refuses to be, once another library has imported Python's own distutils.
    major, minor = map(int, version("setuptools").split(".")[:2])
    if (major, minor) < (70, 1):
        pytest.skip("an older setuptools needs the package wheel")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    unwanted = shutil.ignore_patterns("__pycache__")
    for name in ("minigpt_cli", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-build-isolation", "-w", folder, source)
    (file,) = folder.glob("*.whl")
    return file


def test_files(wheel: Path):
    expected = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "minigpt_cli").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    } | {
        f"minigpt_cli/{path.relative_to(ROOT)}"
        for path in (ROOT / "recipes").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == expected


def test_runs_without_a_checkout(wheel: Path, tmp_path: Path):
    target = tmp_path / "target"
    pip("install", "--target", target, wheel)

    def python(*arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, "-P", *map(str, arguments)], capture_output=True, text=True,
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(target)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert python("-m", "minigpt_cli", "--version") == f"minigpt {__version__}\n"
    assert python(target / "bin/minigpt", "--version") == f"minigpt {__version__}\n"
    assert "finetune-lora" in python("-m", "minigpt_cli", "--help")
    tiny = (ROOT / "recipes/tiny.toml").read_text()
    assert python("-m", "minigpt_cli", "recipes", "tiny") == tiny
    code = (
        "import importlib.resources, minigpt_cli, pathlib\n"
        f"assert pathlib.Path(minigpt_cli.__file__).is_relative_to({str(target)!r})\n"
        "print(importlib.resources.files('minigpt_cli.recipes').joinpath('tiny.toml').read_text(),"
        " end='')"
    )
    assert python("-c", code) == tiny
