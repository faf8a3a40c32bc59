"""Count calls of the system."""

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def system_calls() -> Iterator[Counter[str]]:
    """Count the calls of ``os`` that ask the system, by name, in this thread and in new ones."""
    found: Counter[str] = Counter()

    def count(_: object, event: str, function: object) -> None:
        if event == "c_call" and getattr(function, "__module__", "") == "posix":
            found[str(getattr(function, "__name__", ""))] += 1

    threading.setprofile(count)
    sys.setprofile(count)
    try:
        yield found
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        for name in ("getpid", "fspath"):
            del found[name]
