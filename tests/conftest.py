"""What the tests share: a small real dataset, recipes for it, and minigpt as a real process."""

import contextlib
import random
import shutil
import signal
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minigpt_cli.prepare.sources import Source
from minigpt_cli.prepare.tokenize import tokenize
from minigpt_cli.recipe import Recipe, parse_recipe
from tests.helpers.file_limit import limit_files
from tests.helpers.processes import ROOT, command, environment, heed_signals
from tests.helpers.recipes import TINY

heed_signals()

with contextlib.suppress(ImportError):  # the GPU's machine has none, and needs none
    import hypothesis

    # A busy machine may take long over an example; no test here is about time.
    hypothesis.settings.register_profile("no deadline", deadline=None)
    hypothesis.settings.load_profile("no deadline")


@pytest.fixture(scope="session", autouse=True)
def own_cache_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests leave the user's cache directory alone; started processes inherit this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Source code of Python's library, as tokens of a vocabulary of 320."""
    out = tmp_path_factory.mktemp("data") / "dataset"
    library = sysconfig.get_path("stdlib")
    source = Source("files", (f"{library}/json/*.py", f"{library}/email/*.py"))
    tokenize(source, out, train_vocab=320, val_fraction=0.2, workers=1)
    return out


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So few sequences that a run of 12 steps goes through it more than once."""
    folder = tmp_path_factory.mktemp("small")
    text = (ROOT / "LICENSE").read_text()
    (folder / "a.txt").write_text(text[:4000])
    tokenize(Source("files", (str(folder / "a.txt"),)), folder / "data", train_vocab=320,
             val_fraction=0.25, workers=1)  # fmt: skip
    return folder / "data"


@pytest.fixture(scope="session")
def license_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that doesn't change from one commit to the next, for comparisons with a tolerance."""
    out = tmp_path_factory.mktemp("license") / "data"
    tokenize(Source("files", (str(ROOT / "LICENSE"),)), out, train_vocab=320, val_fraction=0.2,
             workers=1)  # fmt: skip
    return out


@pytest.fixture(scope="session")
def regular(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text of 19 words in random order: a model knows it in 20 steps, and noise stands out."""
    folder = tmp_path_factory.mktemp("regular")
    words = "the a one cat dog bird tree sees hears likes follows big small red and or then now not"
    choice = random.Random(0).choice
    (folder / "text.txt").write_text(" ".join(choice(words.split()) for _ in range(60_000)))
    tokenize(Source("files", (str(folder / "text.txt"),)), folder / "data", train_vocab=300,
             val_fraction=0.1, workers=1)  # fmt: skip
    return folder / "data"


@pytest.fixture
def make_recipe(dataset: Path) -> Callable[..., Recipe]:
    """``make_recipe("train.steps=3", ...)`` -> the tiny recipe with these overrides."""

    def make(*overrides: str, data: Path = dataset) -> Recipe:
        return parse_recipe(TINY.format(data=data), list(overrides), name="tiny")

    return make


@pytest.fixture
def recipe_file(dataset: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY.format(data=dataset))
    return path


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """A run that was stopped leaves its handlers in place, for the process is about to end."""
    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = {signum: signal.getsignal(signum) for signum in kinds}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture(autouse=True)
def no_limit_of_files() -> Iterator[None]:
    """A test that failed between two events has left its ``limit_files``."""
    yield
    limit_files(None)


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a command; whatever is left of it is killed at the test's end."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: object, cwd: Path | None = None) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command(*arguments), cwd=cwd, env=environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def quick() -> Iterator[Path]:
    """A directory in memory where there is one: these tests flush files thousands of times."""
    memory = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
    yield path
    shutil.rmtree(path, ignore_errors=True)
