"""What torch itself holds, saves and sends in a step: the oracle for model/device_memory.py.

Four ways to look: what autograd saves; a step of one rank, whose group of ranks is fake but whose
every allocation counts; a step of such a rank on tensors without storage, so that the model and the
world may have any size; a step of real processes.
"""

import gc
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import profile, record_function
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from minigpt_cli.core.constants import LOGITS_BYTES, MUON_ELEMENTS
from minigpt_cli.data.loader import Batch
from minigpt_cli.distributed import parallel
from minigpt_cli.distributed.world import World
from minigpt_cli.model import attention, block, norm, precision
from minigpt_cli.model.config import ModelConfig
from minigpt_cli.model.gpt import GPT, initialize_weights
from minigpt_cli.model.traffic import Traffic
from minigpt_cli.model.workload import Workload
from minigpt_cli.recipe import OptimizerSettings, Recipe
from minigpt_cli.train.guard import new_guard
from minigpt_cli.train.optimizer import build_optimizers
from minigpt_cli.train.step import StepContext, train_step
from minigpt_cli.train.trainer import warm_up
from tests.helpers.steps_of_recipe import take_steps

DTYPES = {2: torch.bfloat16, 4: torch.float32}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Held:
    """Bytes on one rank: after a backward pass, and at most since the model was made."""

    parameters: int
    gradients: int
    optimizer: int
    peak: int = 0


@contextmanager
def kernels_of_a_gpu() -> Iterator[None]:
    """Go on a CPU the ways that a GPU goes: flash attention, RMSNorm in one kernel whatever the
    weight's dtype, large chunks of logits and batches of matrices."""
    before = attention.CPU_MATMUL_TOKENS, norm.rms_norm
    sizes = (LOGITS_BYTES, MUON_ELEMENTS)
    on_cpu = [size["cpu"] for size in sizes]
    block.ONE_PRODUCT.add("cpu")
    attention.CPU_MATMUL_TOKENS = 0
    norm.rms_norm = lambda x, weight, eps: norm._RMSNorm.apply(x, weight.to(x.dtype), eps)
    for size in sizes:
        size["cpu"] = size["cuda"]
    try:
        yield
    finally:
        block.ONE_PRODUCT.remove("cpu")
        attention.CPU_MATMUL_TOKENS, norm.rms_norm = before
        for size, value in zip(sizes, on_cpu, strict=True):
            size["cpu"] = value


@contextmanager
def fake_ranks(world_size: int, rank: int = 0) -> Iterator[None]:
    """Be one rank of many; what is sent goes nowhere."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def saved_bytes(config: ModelConfig, workload: Workload, device: torch.device = CPU) -> int:
    """What autograd keeps of a forward pass, without the weights and autocast's copies of them."""
    model = GPT(config).to(device).train()
    initialize_weights(model, 0)
    model.checkpoint_activations = workload.activation_checkpointing
    weights = {_address(p) for p in model.parameters()}
    c = config
    together = torch.Size(  # see block.project
        [(c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim, c.hidden_size]
    )
    matrices = [together, *(p.shape for p in model.parameters())]
    shapes = {shape for matrix in matrices for shape in (matrix, matrix[::-1])}
    kept: dict[int, Tensor] = {}  # holding the tensors keeps their addresses from being used again

    def note(tensor: Tensor) -> Tensor:
        copy_of_weight = tensor.dtype == torch.bfloat16 and tensor.shape in shapes
        if _address(tensor) not in weights and not copy_of_weight:
            kept[_address(tensor)] = tensor
        return tensor

    ids = _ids(workload, device)
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        precision.autocast(DTYPES[workload.compute_bytes], device),
    ):
        model(ids, ids)
    kept |= {_address(table): table for table in model._rope or ()}
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def allocated_by_a_rank(config: ModelConfig, workload: Workload) -> int:
    """The high-water mark of the CPU's allocator in two training steps of one rank."""
    gc.collect()
    with fake_ranks(workload.world_size), kernels_of_a_gpu(), profile(profile_memory=True) as found:
        layout = _layout(workload)
        with record_function("the steps"):
            _train(_trainer(config, workload, layout), workload)
    return _high_water(found, "the steps")


def allocated_by_recipe(recipe: Recipe, vocab_size: int) -> int:
    """The high-water mark of the CPU's allocator in two steps, with a CPU's own kernels."""
    gc.collect()
    world = World(rank=0, size=1, device=CPU)
    with profile(profile_memory=True) as found, record_function("the steps"):
        take_steps(recipe, vocab_size, world, parallel.fill_own_rows)
    return _high_water(found, "the steps")


def step_without_storage(
    config: ModelConfig, workload: Workload, rank: int = 0
) -> tuple[Held, Traffic]:
    """A step of one rank; the peak is what torch's tracker saw before the optimizer's turn."""
    with fake_ranks(workload.world_size, rank), kernels_of_a_gpu():
        layout = _layout(workload)
        with FakeTensorMode(), _Sent() as sent:
            with ExitStack() as watching:
                tracker: Any = MemTracker()
                if not workload.sharded:  # it has to see how DDP's buckets are made
                    watching.enter_context(tracker)
                trainer = _trainer(config, workload, layout)
                if workload.sharded:
                    tracker = watching.enter_context(FSDPMemTracker(trainer.model))
                _backward(trainer, workload, between=tracker.reset_mod_stats)
                (snapshot,) = tracker.get_tracker_snapshot("peak").values()
            for each in trainer.optimizers:
                each.step()
            (peak,) = (size for kind, size in snapshot.items() if str(kind) == "Total")
            held = _held(trainer)
            if workload.sharded:  # of what was there before, its tracker knows the model alone
                peak += held.optimizer
            return replace(held, peak=peak), sent.traffic


def steps_of_real_ranks(
    config: ModelConfig, workloads: list[Workload], folder: Path, watch: bool = False
) -> list[list[Held]]:
    """Two training steps and a backward pass of each workload in real processes, over gloo.

    Args:
        watch: take the allocator's high-water mark as well, which takes long.

    Returns:
        For each workload what each rank held.
    """
    (world_size,) = {workload.world_size for workload in workloads}
    mp.spawn(_real_rank, (config, workloads, folder, watch), nprocs=world_size)
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]
    return [[Held(**held) for held in of_ranks] for of_ranks in zip(*ranks, strict=True)]


def _real_rank(
    rank: int, config: ModelConfig, workloads: list[Workload], folder: Path, watch: bool
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank,
        world_size=workloads[0].world_size,
    )  # fmt: skip
    found = []
    with kernels_of_a_gpu(), profile(profile_memory=True) if watch else nullcontext() as profiler:
        for number, workload in enumerate(workloads):
            layout = _layout(workload)
            with record_function(f"workload {number}"):
                found.append(_train(_trainer(config, workload, layout), workload))
            gc.collect()
    if profiler is not None:
        found = [
            replace(held, peak=_high_water(profiler, f"workload {number}"))
            for number, held in enumerate(found)
        ]
    (folder / f"{rank}.json").write_text(json.dumps([asdict(held) for held in found]))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads now and then abort an interpreter that ends


def _layout(workload: Workload) -> parallel.ParallelDims:
    world = World(dist.get_rank(), workload.world_size, CPU)
    made = parallel.choose_parallel_dims(world, workload.strategy, workload.shard_size, 0, 0)
    return replace(made, whole_gradients=workload.whole_gradients)


def _trainer(config: ModelConfig, workload: Workload, layout: parallel.ParallelDims) -> StepContext:
    """Build what build_context builds, whose collectives need real peers."""
    dtype = DTYPES[workload.compute_bytes]
    model = GPT(config).train()
    model.checkpoint_activations = workload.activation_checkpointing
    parallel.apply_fsdp(model, model.layers, model.ends(), layout, dtype)
    forward = parallel.apply_ddp(model, layout)
    if isinstance(forward, DistributedDataParallel) and dist.get_backend() == "fake":
        forward.register_comm_hook(None, _all_reduce)
    return StepContext(
        model=model,
        forward=forward,
        parallel_dims=layout,
        optimizers=build_optimizers(model, OptimizerSettings(lr=1e-3, name=workload.optimizer)),
        scaler=precision.grad_scaler(dtype, CPU),
        guard=new_guard(CPU),
        dtype=dtype,
        seed=0,
        micro_batch_size=workload.micro_batch_size,
        clip_norm=1.0,
        dropout=False,
    )


def _all_reduce(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """What DDP does by itself, but for its future, which the fake group leaves empty."""
    dist.all_reduce(bucket.buffer())
    done = torch.futures.Future[Tensor]()
    done.set_result(bucket.buffer())
    return done


def _train(trainer: StepContext, workload: Workload) -> Held:
    warm_up(trainer, workload.sequence_length)
    ids = _ids(workload).repeat(workload.accumulation, 1)
    for step in range(2):
        train_step(trainer, Batch(ids, ids, None), step, 1.0)
    _backward(trainer, workload)
    return _held(trainer)


def _backward(
    trainer: StepContext, workload: Workload, between: Callable[[], object] | None = None
) -> None:
    """The micro-batches of a step, as train/step.py passes them."""
    ids = _ids(workload)
    for index in range(workload.accumulation):
        if index and between is not None:  # the tracker is told that the model runs again
            between()
        last = index == workload.accumulation - 1
        with parallel.gradient_sync(trainer.forward, trainer.parallel_dims, last):
            with precision.autocast(trainer.dtype, CPU):
                loss = trainer.forward(ids, ids)
            loss.backward()


def _held(trainer: StepContext) -> Held:
    parameters = list(trainer.model.parameters())
    states = [values for each in trainer.optimizers for values in each.state.values()]
    moments = [value for values in states for value in values.values() if value.ndim]
    return Held(
        parameters=_bytes(parameters),
        gradients=_bytes([p.grad for p in parameters if p.grad is not None]),
        optimizer=_bytes(moments),
    )


def _bytes(tensors: list[Tensor]) -> int:
    return sum(part.numel() * part.element_size() for part in parallel.to_local(tensors))


def _high_water(profiler: profile, name: str) -> int:
    """The most that was allocated at once in the range of that name and after it began."""
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    (within,) = (event for event in events if event.name() == name)
    changes = [
        event.nbytes()
        for event in events
        if event.name() == "[memory]" and within.start_ns() <= event.start_ns() <= within.end_ns()
    ]
    return max(accumulate(changes))


_COLLECTIVES = {
    "c10d::_allgather_base_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::allreduce_": "all_reduce",
    "c10d::alltoall_base_": "all_to_all",
}


class _Sent(TorchDispatchMode):
    """Adds up what a ring algorithm makes this rank send for the collectives that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in op.namespace:
            kind = _COLLECTIVES[op._schema.name]
            objects = [arg for arg in args if isinstance(arg, torch.ScriptObject)]
            (group,) = (each for each in objects if "ProcessGroup" in str(each._type()))
            size = dist.ProcessGroup.unbox(group).size()
            tensors = args[0] if kind == "all_reduce" else args[:2]
            whole = max(tensor.numel() * tensor.element_size() for tensor in tensors)
            sent = (2 if kind == "all_reduce" else 1) * (size - 1) * whole // size
            self.traffic = replace(self.traffic, **{kind: getattr(self.traffic, kind) + sent})
        return op(*args, **(kwargs or {}))


def _ids(workload: Workload, device: torch.device = CPU) -> Tensor:
    shape = (workload.micro_batch_size, workload.sequence_length)
    return torch.zeros(shape, dtype=torch.int64, device=device)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
