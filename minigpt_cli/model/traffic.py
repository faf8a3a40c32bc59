"""What a device sends in one training step, by arithmetic."""

from collections import Counter
from dataclasses import dataclass

from minigpt_cli.core.constants import MUON_ELEMENTS
from minigpt_cli.model.config import ModelConfig
from minigpt_cli.model.cost import count_elements, parameter_shapes
from minigpt_cli.model.workload import Workload


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device sends per optimizer step, by ring algorithms."""

    all_gather: int = 0
    reduce_scatter: int = 0
    all_reduce: int = 0  # ddp: over all devices; hsdp: between the groups
    all_to_all: int = 0  # Muon's, among the shards

    @property
    def total(self) -> int:
        return self.all_gather + self.reduce_scatter + self.all_reduce + self.all_to_all


def device_traffic(config: ModelConfig, workload: Workload) -> Traffic:
    """What a device sends in one step, with the padding of uneven shards.

    In a ring of N, gathering or reduce-scattering S bytes makes a device send (N - 1) / N S, and an
    all-reduce twice that. The scalars that ranks agree on are left out.
    """
    c, w, others = config, workload, workload.shards - 1
    shapes = parameter_shapes(c)
    block = count_elements(shapes.block, w.shards)
    outside = count_elements(shapes.outside, w.shards)
    shard = c.num_hidden_layers * block + outside
    gathered = 0
    if w.sharded:  # the blocks again for the backward pass, but for zero2
        times = 1 if w.strategy == "zero2" else 2
        gathered = times * c.num_hidden_layers * block * w.compute_bytes + outside * w.full_bytes
    scatters = 1 if w.whole_gradients else w.accumulation
    replicas = w.world_size // w.shards
    return Traffic(
        all_gather=w.accumulation * others * gathered,
        reduce_scatter=scatters * others * shard * w.full_bytes,
        all_reduce=2 * (replicas - 1) * shard * w.full_bytes // replicas,
        all_to_all=_muon_traffic(c, w.shards) if w.optimizer == "muon" else 0,
    )


def _muon_traffic(config: ModelConfig, shards: int) -> int:
    """Bytes of distributed/parallel.py: over_whole_matrices: each batch of matrices of one shape
    goes to the ranks that work on them and back, in bf16, padded to the same number for each."""
    sent = 0
    for (rows, columns), in_block in Counter(parameter_shapes(config).matrices).items():
        left = in_block * config.num_hidden_layers
        batch = max(1, MUON_ELEMENTS["cuda"] // (rows * columns)) * shards
        while left > 0:
            matrices = -(-min(left, batch) // shards)  # of one rank
            sent += 2 * 2 * (shards - 1) * matrices * -(-rows // shards) * columns
            left -= batch
    return sent
