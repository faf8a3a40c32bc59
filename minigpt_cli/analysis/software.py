"""The versions of Python and of the packages, and what the missing ones are for."""

import importlib.metadata
import platform
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import minigpt_cli
from minigpt_cli.analysis.finding import Finding, State, pip_install
from minigpt_cli.core.errors import first_line

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "minigpt-cli"

# What each extra of pyproject.toml is for.
PURPOSES = {
    "tensorboard": '[log] trackers = ["tensorboard"]',
    "wandb": '[log] trackers = ["wandb"]',
    "trackio": '[log] trackers = ["trackio"]',
    "plot": "minigpt report --png",
    "eval": "minigpt eval --tasks",
}
DEVELOPMENT = ("dev", "docs")
# What every installation has, but training can do without.
_USEFUL = {
    "datasets": "Hugging Face datasets, Parquet and .zst files as sources",
    "plotext": "curves in the terminal",
}
_TRANSFORMERS = "minigpt export, and the end of a run: reload the model as a check"


def software_findings() -> list[Finding]:
    """Look at minigpt, Python, the packages that every command needs, and those of the extras."""
    libc = " ".join(platform.libc_ver()).strip()
    system = f"{platform.system()} {platform.machine()}" + (f", {libc}" if libc else "")
    return [
        Finding("minigpt", minigpt_cli.__version__, "this program"),
        Finding("Python", f"{platform.python_version()}, {system}", "runs it"),
        *_package_findings(),
    ]


def torch_finding() -> Finding:
    """Import torch, which a driver or a library that is missing prevents."""
    try:
        import torch
    except Exception as error:
        found = f"can't be imported: {first_line(error)}"
        again = pip_install("--force-reinstall", _requirement_of("torch"))
        return Finding("torch", found, "computes", "broken", again)
    built = "CPUs"
    if torch.version.cuda is not None:
        built = f"CUDA {torch.version.cuda}"
    elif torch.version.hip is not None:
        built = f"ROCm {torch.version.hip}"
    return Finding("torch", f"{torch.__version__}, built for {built}", "computes")


def _package_findings() -> list[Finding]:
    purpose = "every command"
    try:
        from packaging.requirements import Requirement

        required = [Requirement(each) for each in importlib.metadata.requires(DISTRIBUTION) or []]
    except ImportError as error:  # also importlib.metadata's PackageNotFoundError
        missing = getattr(error, "name", None) or "packaging"
        found = f"not compared with what minigpt needs: {missing} is not installed"
        mend = pip_install("-e", ".") if missing == DISTRIBUTION else pip_install(missing)
        return [Finding("packages", found, purpose, "lacks", mend)]
    fine: list[str] = []
    findings: list[Finding] = []
    optional: list[Finding] = []
    for each in required:
        version = _installed(each.name)
        if each.name == "torch" and version is None:
            continue  # torch_finding says so
        if each.marker is None or each.marker.evaluate({"extra": ""}):
            if _fits(each, version):
                fine.append(f"{each.name} {version}")
            else:
                useful = _USEFUL.get(each.name)
                state: State = "broken" if useful is None else "lacks"
                findings.append(_package(each, version, useful or purpose, state))
            continue
        for extra in _extras_of(each):
            if extra not in DEVELOPMENT:
                feature = PURPOSES.get(extra, f"the extra {extra}")
                optional.append(_package(each, version, feature, "lacks"))
            elif each.name == "transformers":
                optional.append(_package(each, version, _TRANSFORMERS, "lacks"))
    return [*findings, Finding("packages", ", ".join(fine), purpose), *_merged(optional)]


def _merged(findings: list[Finding]) -> list[Finding]:
    """Join what is said of a package that several features need."""
    merged: dict[str, Finding] = {}
    for each in findings:
        before = merged.get(each.what)
        if before is not None:
            each = replace(each, purpose=f"{before.purpose}; {each.purpose}")
        merged[each.what] = each
    return list(merged.values())


def _package(requirement: "Requirement", version: str | None, purpose: str, bad: State) -> Finding:
    name = requirement.name
    wanted = f"{name}{requirement.specifier}"
    if _fits(requirement, version):
        return Finding(name, str(version), purpose)
    if version is None:
        return Finding(name, "not installed", purpose, bad, pip_install(wanted))
    found = f"{version}, needed: {requirement.specifier}"
    return Finding(name, found, purpose, bad, pip_install("--upgrade", wanted))


def _fits(requirement: "Requirement", version: str | None) -> bool:
    from packaging.version import InvalidVersion, Version

    if version is None:
        return False
    try:
        # Containers bring builds such as 2.11.0a0+git, which is before 2.11.0 by the letter.
        return requirement.specifier.contains(Version(version).base_version)
    except InvalidVersion:
        return True


def _extras_of(requirement: "Requirement") -> Iterator[str]:
    for extra in importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []:
        if requirement.marker is not None and requirement.marker.evaluate({"extra": extra}):
            yield extra


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirement_of(name: str) -> str:
    """Return what minigpt needs of a package, such as ``torch>=2.11``."""
    try:
        found = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        found = []
    return next((each for each in found if each.startswith(name)), name)
