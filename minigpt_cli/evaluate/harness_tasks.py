"""Find tasks of lm-evaluation-harness by name, and check those that someone else may have written.

A task is a YAML file. It may name Python functions, metrics that are downloaded as Python code, and
templates of Jinja. Needs the package lm-eval.
"""

import difflib
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.metrics  # fills metric_registry
import yaml
from jinja2.sandbox import SandboxedEnvironment
from lm_eval import utils
from lm_eval.api import registry
from lm_eval.tasks import TaskManager

from minigpt_cli.core.console import log
from minigpt_cli.core.errors import UserError, first_line
from minigpt_cli.core.memory import is_out_of_memory
from minigpt_cli.core.reading import read_text

_OWN = Path(lm_eval.__file__).parent  # the harness's own tasks came with its code
_LOCAL = ("json", "csv", "parquet", "text", "arrow")  # datasets' names for formats of files
_PATTERN = set("*?[")
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class FoundTasks:
    """Tasks that exist and may run.

    Attributes:
        manager: The index of tasks.
        names: Of tasks, groups and tags.
        sandboxed: Whether their templates are kept from Python's own objects.
    """

    manager: TaskManager
    names: list[str]
    sandboxed: bool


def find_tasks(names: list[str], folder: Path | None, trust: bool) -> FoundTasks:
    """Find tasks; their data is not read yet.

    Args:
        names: Of tasks, groups or tags; or patterns with ``*``.
        folder: A directory with tasks, which come before the harness's own; or None.
        trust: Whether the tasks of ``folder`` may run code.

    Raises:
        UserError: There is no such task, or it would run code.
    """
    manager, chosen = _find(names, folder)
    if not trust:
        for file in _files(manager, chosen):
            _check(file)
    return FoundTasks(manager, chosen, folder is not None and not trust)


@contextmanager
def loaded_tasks(found: FoundTasks) -> Iterator[dict[str, Any]]:
    """Load tasks and their data, for the ``with`` block.

    Yields:
        What ``TaskManager.load`` returns.

    Raises:
        UserError: A task or its data can't be read.
    """
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    templates = _sandboxed_templates() if found.sandboxed else nullcontext()
    with templates, _temporary_cache(found.manager, found.names):
        for name in found.names:
            with harness_errors(f"task {name}"):
                its = found.manager.load([name])
            for kind in loaded:
                loaded[kind] |= its[kind]
        yield loaded


def _find(names: list[str], folder: Path | None) -> tuple[TaskManager, list[str]]:
    """Return an index of tasks that knows all names, and the names without patterns."""
    if folder is not None:
        if not folder.is_dir():
            raise UserError(f"--tasks-dir {folder}: no such directory")
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        chosen, missing = _choose(names, manager)
        if not missing and not _unknown(manager, chosen):
            return manager, chosen
    log("reading the harness's own tasks, which takes some seconds")
    manager = TaskManager(include_path=None if folder is None else str(folder))
    chosen, missing = _choose(names, manager)
    if missing:
        raise UserError(_not_found(missing[0], manager, folder))
    return manager, chosen


def _choose(names: list[str], manager: TaskManager) -> tuple[list[str], list[str]]:
    """Return the tasks that the names stand for, and the names that stand for none."""
    chosen: list[str] = []
    missing = []
    for name in names:
        known = name in manager.task_index
        found = [name] if known else manager.match_tasks([name]) if _PATTERN & set(name) else []
        chosen += found
        if not found:
            missing.append(name)
    return list(dict.fromkeys(chosen)), missing


def _not_found(name: str, manager: TaskManager, folder: Path | None) -> str:
    near = difflib.get_close_matches(name, manager.all_tasks, 3)
    hint = f"did you mean {', '.join(near)}?" if near else "is --tasks-dir missing?"
    if folder is None:
        return f"--tasks {name}: no such task; {hint}"
    for file in sorted(folder.rglob("*.yaml")):  # the harness passes over files that it can't read
        _compose(file)
    return f"--tasks {name}: no such task, neither in {folder} nor among the harness's own; " + (
        hint if near else f"those of {folder} are {_listed(manager, folder)}"
    )


def _listed(manager: TaskManager, folder: Path) -> str:
    index = manager.task_index.values()
    own = [each.name for each in index if each.yaml_path and folder in each.yaml_path.parents]
    return ", ".join(sorted(own)[:8]) or "none"


def _entries(manager: TaskManager, names: Iterable[str]) -> Iterator[Any]:
    """Yield the index's entries of tasks, and of all that their groups and tags hold."""
    waiting, seen = list(names), set()
    while waiting:
        name = waiting.pop()
        entry = manager.task_index.get(name)
        if entry is None or name in seen:
            continue
        seen.add(name)
        yield entry
        waiting += [*(_members(entry.cfg or {})), *(entry.tags if entry.cfg is None else ())]


def _members(config: dict[str, Any]) -> Iterator[str]:
    """Yield the names in a group's list of tasks."""
    listed = config.get("task")
    for each in listed if isinstance(listed, list) else []:
        if isinstance(each, dict):
            yield from _members(each)
            each = each.get("group", each.get("task"))
        if isinstance(each, str):
            yield each


def _unknown(manager: TaskManager, names: list[str]) -> bool:
    """Return whether a group names a task that the index doesn't know."""
    return any(
        name not in manager.task_index
        for entry in _entries(manager, names)
        for name in _members(entry.cfg or {})
    )


def _files(manager: TaskManager, names: list[str]) -> list[Path]:
    """Return the YAML files of tasks, and those that they include; without the harness's own."""
    waiting = [entry.yaml_path for entry in _entries(manager, names) if entry.yaml_path]
    found: dict[Path, None] = {}
    while waiting:
        file = waiting.pop().resolve()
        if file in found or _OWN in file.parents:
            continue
        found[file] = None
        for key, value in _pairs(_compose(file)):
            if key == "include":
                named = value.value if isinstance(value, yaml.SequenceNode) else [value]
                waiting += [file.parent / str(each.value) for each in named]
    return list(found)


def _compose(file: Path) -> yaml.Node | None:
    """Parse a YAML file, without making objects of it."""
    try:
        return yaml.compose(read_text(file), Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f"line {where.line + 1}: " if where is not None else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{file}: is not YAML: {line}{problem}") from None


def _nodes(root: yaml.Node | None) -> Iterator[yaml.Node]:
    """Yield each node once; an alias may lead back to a node that holds it."""
    waiting, seen = [root] if root is not None else [], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.MappingNode):
            waiting += [each for pair in node.value for each in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value


def _pairs(root: yaml.Node | None) -> Iterator[tuple[str, yaml.Node]]:
    """Yield all keys of all mappings, with their values."""
    for node in _nodes(root):
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode):
                    yield key.value, value


def _check(file: Path) -> None:
    """Refuse a task that asks for more than the harness's own metrics and filters.

    Raises:
        UserError: It runs code, or writes to a directory of its choice.
    """
    root = _compose(file)
    for node in _nodes(root):
        if node.tag.startswith("!") or "python" in node.tag:
            what = node.value if isinstance(node, yaml.ScalarNode) else ""
            raise _untrusted(file, node, f"runs Python code ({node.tag} {what:.60})")
    for key, value in _pairs(root):
        text = str(value.value) if isinstance(value, yaml.ScalarNode) else ""
        if key == "metric" and text not in registry.metric_registry:
            raise _untrusted(file, value, f"loads the metric {text:.60} as Python code")
        if key in ("hf_evaluate", "unsafe_code") and text.lower() not in ("false", "no", "off"):
            raise _untrusted(file, value, f"runs Python code ({key})")
        if key in ("use_prompt", "cache_dir"):
            raise _untrusted(file, value, f"uses {key}, which reads or writes elsewhere")


def _untrusted(file: Path, node: yaml.Node, what: str) -> UserError:
    return UserError(
        f"{file}:{node.start_mark.line + 1}: {what}; if you trust it, add --trust-tasks"
    )


@contextmanager
def _temporary_cache(manager: TaskManager, names: list[str]) -> Iterator[None]:
    """Keep copies of local data files in a directory that is removed afterwards.

    Data of the Hub stays in its usual cache, which also serves without a network.
    """
    configs = [entry.cfg or {} for entry in _entries(manager, names)]
    sources = [str(each["dataset_path"]) for each in configs if "dataset_path" in each]
    if not all(each in _LOCAL or Path(each).exists() for each in sources):
        yield
        return
    before = datasets.config.HF_DATASETS_CACHE
    with tempfile.TemporaryDirectory() as cache:
        datasets.config.HF_DATASETS_CACHE = Path(cache)
        try:
            yield
        finally:
            datasets.config.HF_DATASETS_CACHE = before


@contextmanager
def _sandboxed_templates() -> Iterator[None]:
    """Let templates of tasks reach nothing but their text and data; else they could run code."""
    before = utils.env
    after = SandboxedEnvironment(
        loader=before.loader,
        undefined=before.undefined,
        keep_trailing_newline=before.keep_trailing_newline,
    )
    after.filters = before.filters
    utils.env = after
    try:
        yield
    finally:
        utils.env = before


@contextmanager
def harness_errors(what: str) -> Iterator[None]:
    """Turn errors that a task can cause in the harness into one line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError | AssertionError) or is_out_of_memory(error):
            raise
        kind = type(error).__name__
        raise UserError(f"{what}: {kind}: {first_line(error)} (--debug shows where)") from error
