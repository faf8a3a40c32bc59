"""What import-linter can't say: who may import torch.distributed, and what starts without torch."""

import ast
import re
import subprocess
import sys
from pathlib import Path

from tests.helpers.processes import ROOT

PACKAGE = ROOT / "minigpt_cli"


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return found


def test_only_some_modules_import_torch_distributed():
    users = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any(name.startswith("torch.distributed") for name in imported(path))
    }
    allowed = ("distributed/", "checkpoint/")
    assert {user for user in users if not user.startswith(allowed)} == set()
    assert "checkpoint/tensors.py" in users  # the search finds what is there


def test_no_two_things_share_a_name():
    files: dict[str, list[Path]] = {}
    names: dict[str, list[Path]] = {}
    for path in PACKAGE.rglob("*.py"):
        if path.name != "__init__.py" and "commands" not in path.parts:
            files.setdefault(path.name, []).append(path)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                names.setdefault(node.name, []).append(path)
    del names["main"]  # of cli.py and of __main__.py, which calls it
    assert "loop.py" in files  # the search finds what is there
    assert {"GPT", "train_step"} <= names.keys()
    for found in (files, names):
        assert {name: paths for name, paths in found.items() if len(paths) > 1} == {}


def test_no_module_is_imported_under_an_alias():
    usual = {"F", "np", "dist", "pa", "pq"}
    aliases = {
        (path.name, name.asname)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
        if name.asname is not None
    }
    assert {alias for alias in aliases if alias[1] not in usual} == set()


def test_nothing_loads_pickles():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert "torch.load(" not in text, path
        unpickles = r"(gather|scatter|broadcast)_object|dcp\.(save|load)\(|async_save"
        assert not re.search(unpickles, text), path
        assert not {"pickle", "dill", "marshal"} & imported(path), path


def test_help_imports_neither_torch_nor_datasets():
    code = (
        "import sys; sys.argv = ['minigpt', '--help']\n"
        "from minigpt_cli.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'datasets', 'numpy', 'tokenizers', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "pretrain" in done.stdout
