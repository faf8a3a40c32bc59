"""Links in a received run, and files of a user in the directory of a new one: nothing outside or
foreign is written to."""

import shutil
from pathlib import Path

from tests.faults.scene import STEPS, Scene, copy_of

_TEMPORARY = (
    ".recipe.toml.tmp", ".tokenizer.json.tmp", ".environment.json.tmp", ".metrics.jsonl.tmp",
    ".samples.jsonl.tmp", ".status.json",
)  # fmt: skip
_REPLACED = ("metrics.jsonl", "samples.jsonl", "environment.json", "tokenizer.json", "status.json")
_IN_CHECKPOINTS = (
    f".writing-step-{STEPS:08d}",
    f".deleting-step-{1:08d}",
    f".replaced-step-{1:08d}",
)
_OURS = (
    "recipe.toml", "metrics.jsonl", "samples.jsonl", "tokenizer.json", "environment.json",
    "status.json", "incidents", "final", "checkpoints",
)  # fmt: skip


def links_to_files(scene: Scene) -> int:
    """A run whose every file name is a link to somebody's file goes on, and that file stays."""
    names = (*_TEMPORARY, *_REPLACED, *_IN_CHECKPOINTS)
    for name in names:
        run, outside = _received(scene)
        target = outside / "thesis.txt"
        folder = run / "checkpoints" if name in _IN_CHECKPOINTS else run
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(outside if name in _IN_CHECKPOINTS else target)
        code, said = scene.do(*scene.go(run))
        assert code == 0, said
        assert _content(outside) == {"thesis.txt": b"years of work"}, name
        scene.check_same(run, metrics=name not in _REPLACED)
        shutil.rmtree(run)
    return len(names)


def links_to_directories(scene: Scene) -> int:
    """Where a run would write and delete in somebody's directory, it is refused."""
    for name in ("checkpoints", "incidents", ".lock"):
        run, outside = _received(scene)
        if name == "checkpoints":
            (run / name).rename(outside / name)
            (run / name).symlink_to(outside / name)
        else:
            (run / name).symlink_to(outside if name == "incidents" else outside / "lock")
        before = _content(outside)
        for arguments in (scene.go(run), ["resume", run]):
            code, said = scene.do(*arguments)
            assert code == 2, said
            assert "Traceback" not in said
        assert _content(outside) == before, name
    return 3


def out_over_files(scene: Scene) -> int:
    """A new run in a directory with a file of one of its names is refused; all stays as it is."""
    for name in _OURS:
        mine = scene.place("mine")
        mine.mkdir()
        if "." in name:
            (mine / name).write_text('{"mine": true}')
        else:
            (mine / name).mkdir()
            (mine / name / "thesis.txt").write_text("years of work")
        _check_refused(scene, mine, f"{mine} holds {name}, which the run would overwrite")
    run = copy_of(scene.straight(), scene.place("mine"))
    shutil.rmtree(run / "checkpoints")
    (run / "final" / "thesis.txt").write_text("years of work")
    _check_refused(scene, run, "which the run would overwrite")
    return len(_OURS) + 1


def _received(scene: Scene) -> tuple[Path, Path]:
    """A copy of the straight run without its last checkpoint, and a directory of a user."""
    run = copy_of(scene.straight(), scene.place("received"))
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
    outside = scene.place("mine")
    outside.mkdir()
    (outside / "thesis.txt").write_text("years of work")
    return run, outside


def _check_refused(scene: Scene, directory: Path, message: str) -> None:
    before = _content(directory)
    code, said = scene.do("pretrain", scene.recipe, "--out", directory)
    assert code == 2, said
    assert message in said, said
    assert _content(directory) == before


def _content(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
