"""Count torch's operations."""

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class CountOps(TorchDispatchMode):
    """Counts all operations by name, also those of a backward pass.

    Attributes:
        calls: name, for example ``mm`` -> how many.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket._qualified_op_name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))

    @property
    def products(self) -> int:
        """Products of two matrices."""
        return self.calls["mm"] + self.calls["addmm"]
