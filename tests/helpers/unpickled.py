"""Count what is unpickled in this process. Import it before torch, which keeps pickle's names."""

import pickle
import traceback
from typing import Any

STACKS: list[str] = []
"""Where something was unpickled."""

_loads, _load, _Unpickler = pickle.loads, pickle.load, pickle.Unpickler


def _record() -> None:
    STACKS.append("".join(traceback.format_stack(limit=8)[:-2]))


class _CountingUnpickler(_Unpickler):
    def load(self) -> Any:
        _record()
        return super().load()


def _counting_loads(*arguments: Any, **options: Any) -> Any:
    _record()
    return _loads(*arguments, **options)


def _counting_load(*arguments: Any, **options: Any) -> Any:
    _record()
    return _load(*arguments, **options)


pickle.Unpickler, pickle.loads, pickle.load = _CountingUnpickler, _counting_loads, _counting_load
