"""One training step, and how it is spread over devices."""

from dataclasses import dataclass
from typing import Literal

from minigpt_cli.recipe import AdapterSettings, Recipe

Strategy = Literal["single", "ddp", "zero2", "fsdp", "hsdp"]
# False: save what the backward pass needs; True: recompute it from a block's input; "selective":
# save the results of matrix products and attention, and recompute the rest.
Checkpointing = Literal[True, False, "selective"]


@dataclass(frozen=True)
class Workload:
    """One training step, and how it is spread over devices.

    Attributes:
        micro_batch_size: sequences per forward pass of a device.
        accumulation: micro-batches per device and step; only the last one synchronises.
        shard_size: hsdp: devices that hold the model between them.
        compute_bytes: of matrix products: 2 for bf16 and fp16, 4 for fp32, 8 for fp64.
        device_type: "cuda" or "cpu", whose kernels differ.
        adapter: trained beside frozen weights; None: all weights are trained.
        packed: whether sequences hold several examples.
    """

    strategy: Strategy
    world_size: int
    micro_batch_size: int
    sequence_length: int
    accumulation: int = 1
    shard_size: int | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"
    compute_bytes: int = 2
    activation_checkpointing: Checkpointing = False
    device_type: str = "cuda"
    adapter: AdapterSettings | None = None
    packed: bool = False

    @property
    def sharded(self) -> bool:
        return self.strategy not in ("single", "ddp")

    @property
    def shards(self) -> int:
        """Devices over which weights, gradients and optimizer state are spread."""
        if self.strategy == "hsdp":
            assert self.shard_size is not None
            assert self.world_size % self.shard_size == 0
            return self.shard_size
        return self.world_size if self.sharded else 1

    @property
    def full_bytes(self) -> int:
        """Of weights, gradients, optimizer state and the residual stream: float32, or float64 for
        checking."""
        return max(4, self.compute_bytes)

    @property
    def tokens(self) -> int:
        """In one micro-batch."""
        return self.micro_batch_size * self.sequence_length


def workload_of(
    recipe: Recipe,
    world_size: int,
    device_type: str,
    strategy: Strategy,
    *,
    shard_size: int | None = None,
    compute_bytes: int | None = None,
    packed: bool | None = None,
) -> Workload:
    """Build the workload of a recipe.

    Args:
        recipe: its global batch is divisible among the devices.
        world_size: number of devices.
        device_type: "cuda" or "cpu".
        strategy: hsdp needs a ``shard_size``, here or in the recipe.
        compute_bytes: of matrix products; by default the recipe's dtype, ``auto`` being bf16.
        packed: whether sequences hold several examples; by default if the recipe says so.
    """
    train = recipe.train
    micro = train.micro_batch_size or max(1, train.global_batch_size // world_size)
    if compute_bytes is None:
        compute_bytes = {"fp32": 4, "fp64": 8}.get(recipe.precision.dtype, 2)
    if packed is None:
        packed = recipe.data.source is not None and recipe.data.source.format == "instructions"
    return Workload(
        strategy=strategy,
        world_size=world_size,
        micro_batch_size=micro,
        sequence_length=train.sequence_length,
        accumulation=max(1, train.global_batch_size // (world_size * micro)),
        shard_size=(shard_size or recipe.distributed.shard_size) if strategy == "hsdp" else None,
        optimizer=recipe.optimizer.name,
        compute_bytes=compute_bytes,
        activation_checkpointing=train.activation_checkpointing,
        device_type=device_type,
        adapter=None if recipe.lora is None else recipe.lora.adapter,
        packed=packed,
    )
