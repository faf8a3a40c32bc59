"""Compute the least time that a training step can take on an H100, per component, without a GPU.

    python -m benchmarks.roofline --compile --json roofline.json

It runs on the null GPU (tests/nullgpu), so it needs torch's CUDA wheel and gcc. Each kernel takes
the longer of two times: its bytes over the memory's bandwidth, its FLOPs over the peak. The bytes
of a compiled kernel are those of torch's inductor metrics, the bytes of all others are those of the
tensors that it reads and writes. FLOPs are those of torch's flop registry. Launches of kernels and
matrix products are counted by the null GPU, peak memory by torch's allocator.
"""

import argparse
import ctypes
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from minigpt_cli.core.text_table import text_table
from minigpt_cli.data.loader import Batch
from minigpt_cli.distributed.parallel import ParallelDims
from minigpt_cli.distributed.world import World
from minigpt_cli.model import cross_entropy, gpt
from minigpt_cli.recipe.schema import (
    ModelSettings,
    OptimizerSettings,
    PrecisionSettings,
    Recipe,
    TrainSettings,
)
from minigpt_cli.train import step as step_module
from minigpt_cli.train.trainer import build_context, warm_up
from tests.nullgpu import counts
from tests.nullgpu.build import build

BANDWIDTH = 3.35e12  # bytes per second of an H100 SXM
PEAK = 989e12  # dense bf16 and fp16 FLOP/s
PEAK_FP32 = 67e12

# Views and new tensors: nothing runs on the device.
FREE = {
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "_unsafe_view",
}


@dataclass
class Component:
    """What a part of the step costs.

    Attributes:
        seconds: the sum of its kernels' least times.
        matmul_seconds: those of them that multiply matrices or attend.
        read_write: bytes.
        flops: by the flop registry.
        launches: kernels that are no matrix product, torch's and compiled ones.
        products: matrix products.
        peak: bytes, the allocator's peak within it.
    """

    seconds: float = 0.0
    matmul_seconds: float = 0.0
    read_write: float = 0.0
    flops: float = 0.0
    launches: int = 0
    products: int = 0
    peak: int = 0


class Roofline(TorchDispatchMode):
    """Adds up bytes and FLOPs of all kernels, each for the component that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.components: dict[str, Component] = defaultdict(Component)
        self.kernels: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
        self._stack = ["other"]

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled code run below this mode."""
        return True

    @contextmanager
    def component(self, name: str) -> Iterator[None]:
        """Count what runs inside for this component."""
        self.count_launches()
        self._stack.append(name)
        try:
            yield
        finally:
            self.count_launches()
            self._stack.pop()

    def count_launches(self) -> None:
        """Add what the null GPU has counted since the last call to the current component."""
        found, part = counts.counts(), self.components[self._stack[-1]]
        part.launches += found.total("kernel", "triton")
        part.products += found.total("gemm")
        part.peak = max(part.peak, torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        counts.reset()

    def add(self, name: str, read_write: float, flops: float, half: bool) -> None:
        """Add one kernel; ``half``: it multiplies bf16 or fp16."""
        seconds = max(read_write / BANDWIDTH, flops / (PEAK if half else PEAK_FP32))
        part = self.components[self._stack[-1]]
        part.seconds += seconds
        part.matmul_seconds += seconds if flops else 0.0
        part.read_write += read_write
        part.flops += flops
        kernel = self.kernels[self._stack[-1], name]
        kernel[0] += 1
        kernel[1] += read_write
        kernel[2] += seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        is_view = returns and all(r.alias_info and not r.alias_info.is_write for r in returns)
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and name not in FREE and not is_view:
            self.add(name, *_bytes_and_flops(func, name, args, kwargs or {}, out))
        return out


def _bytes_and_flops(
    func: Any, name: str, args: Any, kwargs: Any, out: Any
) -> tuple[float, float, bool]:
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    schema = func._schema.arguments
    values = [
        args[i] if i < len(args) else kwargs.get(argument.name) for i, argument in enumerate(schema)
    ]
    written = [
        t
        for value, argument in zip(values, schema, strict=True)
        if argument.alias_info is not None and argument.alias_info.is_write
        for t in tree_leaves(value)
        if isinstance(t, Tensor)
    ]
    read = sum(map(_size, inputs))
    if name in ("copy_", "fill_", "zero_") or func._overloadname == "out":  # overwritten, not read
        read -= sum(map(_size, written))
    if name in ("embedding", "index", "gather"):  # not the whole table
        read = sum(map(_size, outputs)) + sum(map(_size, inputs[1:]))
    read_write: float = read + sum(map(_size, written or outputs))
    if name in ("zeros_like", "ones_like", "full_like"):
        read_write = _size(out)
    if name in ("scatter_", "scatter_add_"):
        read_write = 3 * _size(inputs[1])
    flops = 0.0
    if func.overloadpacket in flop_registry:
        plain = {k: v for k, v in kwargs.items() if k not in ("out", "out_dtype")}
        flops = flop_registry[func.overloadpacket](*args, **plain, out_val=out)
    half = any(t.dtype in (torch.bfloat16, torch.float16) for t in inputs)
    return read_write, flops, half


def _size(tensor: Tensor) -> int:
    """Bytes; an expanded tensor is as large as what it expands."""
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride else 1
    return size


def measure(recipe: Recipe, vocab_size: int) -> tuple[Roofline, int]:
    """Take two steps of a recipe, the second one under the eyes of a ``Roofline``.

    Returns:
        (the roofline, the allocator's peak in bytes).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)  # the null GPU has no cuDNN
    roofline = Roofline()
    if recipe.precision.compile:
        _count_compiled_kernels(roofline)
    context = build_context(recipe, vocab_size, World(0, 1, torch.device("cuda", 0)))
    warm_up(context, recipe.train.sequence_length)
    shape = (recipe.train.global_batch_size, recipe.train.sequence_length + 1)
    tokens = torch.zeros(shape, dtype=torch.int64, device="cuda")
    batch = Batch(tokens[:, :-1], tokens[:, 1:], None)
    step_module.train_step(context, batch, 0, 1.0)
    torch.cuda.reset_peak_memory_stats()
    counts.reset()
    roofline.components.clear()
    roofline.kernels.clear()
    with _components(roofline), roofline:
        step_module.train_step(context, batch, 1, 1.0)
        roofline.count_launches()
    return roofline, max(part.peak for part in roofline.components.values())


def _count_compiled_kernels(roofline: Roofline) -> None:
    """Have inductor note the bytes of its kernels, and count each launch."""
    from torch._inductor import config
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    config.benchmark_kernel = True  # each kernel then knows its bytes
    config.force_disable_caches = True  # kernels of the cache don't
    launch = CachingAutotuner.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        gigabytes = self.inductor_meta["kernel_num_gb"]
        roofline.add(self.fn.__name__, 1e9 * gigabytes, 0.0, False)
        return launch(self, *args, **kwargs)

    CachingAutotuner.run = run


@contextmanager
def _components(roofline: Roofline) -> Iterator[None]:
    """Give names to the parts of a step."""
    parts = [
        (gpt.Block, "__call__", "blocks, forward"),
        (torch.Tensor, "backward", "blocks, backward"),
        (gpt, "projected_cross_entropy", "loss"),
        (cross_entropy._ProjectedCrossEntropy, "backward", "loss"),
        (ParallelDims, "global_norm", "gradient norm"),
        (step_module, "watch_step", "guard"),
        (step_module, "update_weights", "optimizer"),
    ]
    before = [(owner, name, owner.__dict__.get(name)) for owner, name, _ in parts]
    for owner, name, label in parts:
        static = isinstance(owner.__dict__.get(name), staticmethod)
        wrapped = _labelled(roofline, label, getattr(owner, name))
        setattr(owner, name, staticmethod(wrapped) if static else wrapped)
    try:
        yield
    finally:
        for owner, name, function in before:
            if function is None:
                delattr(owner, name)
            else:
                setattr(owner, name, function)


def _labelled(roofline: Roofline, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with roofline.component(label):
            return function(*args, **kwargs)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", default="gpt2")
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--kernels", type=int, default=0, help="print so many kernels as well")
    parser.add_argument("--json", type=Path, metavar="FILE")
    a = parser.parse_args()
    on_null_gpu()
    recipe = Recipe(
        model=ModelSettings(
            family=a.family,
            hidden_size=a.hidden,
            num_hidden_layers=a.layers,
            num_attention_heads=a.heads,
        ),
        train=TrainSettings(
            global_batch_size=a.batch,
            sequence_length=a.sequence_length,
            micro_batch_size=a.micro_batch,
            deterministic=a.deterministic,
            activation_checkpointing=a.recompute,
        ),
        optimizer=OptimizerSettings(lr=3e-4, name=a.optimizer),
        precision=PrecisionSettings(dtype=a.dtype, compile=a.compile),
    )
    roofline, peak = measure(recipe, a.vocab)
    found = dict(sorted(roofline.components.items(), key=lambda item: -item[1].seconds))
    if a.json:
        settings = {k: v for k, v in vars(a).items() if k not in ("json", "kernels")}
        parts = {name: asdict(part) for name, part in found.items()}
        text = json.dumps({"settings": settings, "peak": peak, "components": parts}, indent=1)
        a.json.write_text(text + "\n")
    print(_table(found, peak))
    for (part, name), (calls, size, seconds) in sorted(
        roofline.kernels.items(), key=lambda item: -item[1][2]
    )[: a.kernels]:
        print(f"{part:17} {calls:5} {size / 1e9:7.2f} GB {1e3 * seconds:7.3f} ms  {name[:90]}")


def _table(components: dict[str, Component], peak: int) -> str:
    whole = Component(
        *(sum(getattr(part, field) for part in components.values()) for field in _SUMS), peak
    )
    rows = [
        [
            name,
            f"{1e3 * part.seconds:.2f}",
            f"{1e3 * part.matmul_seconds:.2f}",
            f"{part.read_write / 1e9:.2f}",
            f"{part.flops / 1e12:.2f}",
            f"{part.launches}",
            f"{part.products}",
            f"{part.peak / 2**30:.2f}",
        ]
        for name, part in [*components.items(), ("all", whole)]
    ]
    titles = ["component", "ms", "products ms", "GB", "TFLOP", "launches", "products", "peak GiB"]
    return text_table(titles, rows, left=(0,))


_SUMS = ("seconds", "matmul_seconds", "read_write", "flops", "launches", "products")


def on_null_gpu() -> None:
    """Start this process again with the null GPU preloaded, if it isn't yet."""
    try:
        if hasattr(ctypes.CDLL("libcuda.so.1"), "nullgpu_report"):
            return
    except OSError:
        pass
    directory = Path("build/nullgpu").resolve()
    directory.mkdir(parents=True, exist_ok=True)
    os.environ |= {"LD_PRELOAD": str(build(directory)), "TRITON_LIBCUDA_PATH": str(directory)}
    os.execv(sys.executable, sys.orig_argv)


if __name__ == "__main__":
    main()
