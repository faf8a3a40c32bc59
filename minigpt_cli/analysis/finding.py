"""One thing that ``minigpt doctor`` looked at."""

import importlib.util
import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_SYSTEM = "/usr/bin:/bin:/usr/sbin:/sbin"

# ok; a feature is missing or slow; training is not possible.
State = Literal["ok", "lacks", "broken"]


@dataclass(frozen=True)
class Finding:
    """A line of the doctor's table.

    Attributes:
        what: the thing, in a word or two.
        found: what it is here.
        purpose: what it is for.
        state: ``lacks``: something is missing or slow; ``broken``: training is not possible.
        mend: the command that mends it; empty if there is none.
    """

    what: str
    found: str
    purpose: str
    state: State = "ok"
    mend: str = ""


def pip_install(*arguments: str) -> str:
    """Return the command that installs packages for the Python that runs this."""
    packages = " ".join(map(shlex.quote, arguments))
    if importlib.util.find_spec("pip") is None:  # uv makes such environments
        return f"uv pip install --python {shlex.quote(sys.executable)} {packages}"
    found = shutil.which("pip")
    if found is not None and Path(found).parent == Path(sys.executable).parent:
        return f"pip install {packages}"
    return f"{shlex.quote(sys.executable)} -m pip install {packages}"


def system_install(apt: str, dnf: str) -> str:
    """Return the command that installs a package of the system.

    Args:
        apt: its name in Debian and Ubuntu.
        dnf: its name in Fedora and Red Hat.
    """
    sudo = "" if os.geteuid() == 0 else "sudo "
    managers = ("apt-get", "dnf", "yum", "zypper")
    found = next((each for each in managers if shutil.which(each, path=_SYSTEM)), managers[0])
    return f"{sudo}{found} install {apt if found == managers[0] else dnf}"
