"""Cost of a model by arithmetic: parameters, FLOPs, memory and traffic per device."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from minigpt_cli.core.constants import GPU_LOGITS_BYTES, GPU_MUON_ELEMENTS
from minigpt_cli.model.config import ModelConfig
from minigpt_cli.model.gpt import meta_model

# Dense peak of matrix products in bf16 or fp16, FLOP/s, from the makers' data sheets (the figures
# there marked "with sparsity" are twice these). First match wins: longer names stand first.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A40": 149.7e12,
    "A6000": 154.8e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
    "MI250X": 383e12,
}


def parameter_shapes(config: ModelConfig) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Return the shapes of one block's parameters, and of those outside the blocks."""
    one_block = meta_model(replace(config, num_hidden_layers=1))
    block = [tuple(p.shape) for p in one_block.layers.parameters()]
    named = one_block.named_parameters()
    return block, [tuple(p.shape) for name, p in named if not name.startswith("layers.")]


def parameter_count(config: ModelConfig) -> int:
    """Every trainable number, tied embeddings counted once."""
    block, outside = parameter_shapes(config)
    return config.num_hidden_layers * sum(map(math.prod, block)) + sum(map(math.prod, outside))


def flops_per_token(config: ModelConfig, sequence_length: int, adapters: int | None = None) -> int:
    """FLOPs of forward and backward for one token: 6N + 12 L H T (Chowdhery et al. 2022, App. B).

    Where only so many parameters of ``adapters`` are trained, frozen weights get no gradient: 4N.

    N leaves out the embeddings that are only looked up. H is the width of attention. Recomputed
    activations and the causal mask's savings don't count, so MFU compares across tools.
    """
    c = config
    looked_up = c.max_position_embeddings * c.hidden_size if c.family == "gpt2" else 0
    if not c.tie_word_embeddings:
        looked_up += c.vocab_size * c.hidden_size
    width = c.num_attention_heads * c.head_dim
    used = parameter_count(c) - looked_up
    matrices = 6 * used if adapters is None else 4 * used + 6 * adapters
    return matrices + 12 * c.num_hidden_layers * width * sequence_length


def peak_flops(device_name: str) -> float | None:
    """The device's dense bf16 peak in FLOP/s, or None where it isn't known (every CPU)."""
    if "Laptop" in device_name:  # slower than the desktop card of the same name
        return None
    return next(
        (peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), None
    )


# --- memory and traffic on many devices -----------------------------------------------------------
# The strategies are those of distributed/parallel.py. `ddp` keeps everything on every device.
# `fsdp` shards weights, gradients and optimizer state, and gathers the weights of one block at a
# time (ZeRO-3, Rajbhandari et al. 2020). `zero2` keeps gathered weights until the backward pass.
# `hsdp` is fsdp within groups of `shard_size` devices; all groups hold the same. Activations are
# those of eager kernels on a GPU with flash attention. docs/scale.md has tables of it.


@dataclass(frozen=True)
class Workload:
    """One training step, and how it is spread over devices."""

    strategy: Literal["single", "ddp", "zero2", "fsdp", "hsdp"]
    world_size: int
    micro_batch_size: int  # sequences
    sequence_length: int
    accumulation: int = 1  # micro-batches per device and step; only the last one synchronises
    shard_size: int | None = None  # hsdp: devices that hold the model between them
    optimizer: Literal["adamw", "muon"] = "adamw"
    compute_bytes: int = 2  # of matrix products: 2 for bf16 and fp16, 4 for fp32, 8 for fp64
    activation_checkpointing: bool = False

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


@dataclass(frozen=True)
class Memory:
    """Bytes on the device that holds most."""

    parameters: int
    gradients: int
    optimizer: int
    gathered: int  # weights for computing: gathered from the shards, or autocast's copies
    activations: int  # saved for the backward pass, without what the loss saves
    loss: int  # at the loss: the gradients it makes at once, a chunk of logits
    backward: int  # in the backward pass of one block, beside what was saved
    peak: int  # less than the sum: not all of them live at once


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


def device_memory_needed(config: ModelConfig, workload: Workload) -> Memory:
    """What a device needs for one step.

    On top come the CUDA context, the communication library's buffers and the allocator's fragments.
    An optimizer's scratch space doesn't: by then the activations are gone.
    """
    c, w, full, compute = config, workload, workload.full_bytes, workload.compute_bytes
    layers = c.num_hidden_layers
    block, outside = (_count(shapes) for shapes in parameter_shapes(c))
    whole = layers * block + outside
    parameters = shard_elements(c, w.shards) * full
    optimizer = optimizer_elements(c, w.optimizer, w.shards) * full

    if not w.sharded:
        # Autocast's copies of the blocks' matrices live until the backward pass has used them.
        gathered = layers * _matrices(c) * compute if compute < full else 0
    elif w.strategy == "zero2":
        gathered = outside * full + (layers + 1) * block * compute
    else:  # a block at a time; what is outside the blocks stays, and in float32
        gathered = outside * full + block * compute

    # FSDP adds up whole gradients until the last micro-batch lets it scatter them.
    gradients = whole * full if not w.sharded or w.accumulation > 1 else parameters
    saved, entering = w.tokens * _saved_per_token(c, w), w.tokens * c.hidden_size * full
    kept, recomputed = (entering, saved - entering) if w.activation_checkpointing else (saved, 0)
    activations = layers * kept + _saved_outside_blocks(c, w)
    loss = _loss(c, w)
    backward = _backward_of_block(c, w) + recomputed

    # DDP's buckets always live; elsewhere a step begins without gradients.
    early = gradients if w.strategy == "ddp" or w.accumulation > 1 else 0
    leaving = block * full if w.sharded else 0  # a block's gradients, copied to be scattered
    first_leaving = 0 if early else leaving  # a copy takes the place of what was added up
    moments = (
        early + activations + max(loss, backward),  # forward turns into backward
        early
        + activations
        - kept
        - w.tokens * _norm(c, w)
        + backward
        + first_leaving,  # a block later
        gradients + kept + backward - _coming(c, w) + leaving,  # the last block to be passed
        gradients + outside * full * (2 if w.sharded else 1),  # the embeddings
    )
    peak = parameters + optimizer + gathered + max(moments)
    return Memory(parameters, gradients, optimizer, gathered, activations, loss, backward, peak)


def device_traffic(config: ModelConfig, workload: Workload) -> Traffic:
    """What a device sends in one step, with the padding of uneven shards.

    In a ring of N, gathering or reduce-scattering S bytes makes a device send (N - 1) / N S, and an
    all-reduce twice that. The scalars that ranks agree on are left out.
    """
    c, w, others = config, workload, workload.shards - 1
    block, outside = (_count(shapes, w.shards) for shapes in parameter_shapes(c))
    shard = c.num_hidden_layers * block + outside
    gathered = 0
    if w.sharded:  # the blocks again for the backward pass, but for zero2
        times = 1 if w.strategy == "zero2" else 2
        gathered = times * c.num_hidden_layers * block * w.compute_bytes + outside * w.full_bytes
    replicas = w.world_size // w.shards
    return Traffic(
        all_gather=w.accumulation * others * gathered,
        reduce_scatter=others * shard * w.full_bytes,
        all_reduce=2 * (replicas - 1) * shard * w.full_bytes // replicas,
        all_to_all=_muon_traffic(c, w.shards) if w.optimizer == "muon" else 0,
    )


def shard_elements(config: ModelConfig, shards: int = 1) -> int:
    """Weights on a device: of each tensor the rows of the largest shard, to which FSDP2 pads."""
    block, outside = parameter_shapes(config)
    return config.num_hidden_layers * _count(block, shards) + _count(outside, shards)


def optimizer_elements(config: ModelConfig, optimizer: str, shards: int = 1) -> int:
    """Numbers that the optimizer keeps on a device: AdamW two for each weight; Muon one for each
    of the blocks' matrices, and leaves the other weights to AdamW."""
    elements = 2 * shard_elements(config, shards)
    if optimizer == "muon":
        elements -= config.num_hidden_layers * _matrices(config, shards)
    return elements


def _count(shapes: Iterable[tuple[int, ...]], shards: int = 1) -> int:
    return sum(-(-rows // shards) * math.prod(rest) for rows, *rest in shapes)


def _matrices(config: ModelConfig, shards: int = 1) -> int:
    """Weights in one block's matrices, or in the largest shard of them."""
    block, _ = parameter_shapes(config)
    return _count([shape for shape in block if len(shape) == 2], shards)


def _norm(config: ModelConfig, workload: Workload) -> int:
    """Bytes saved by a norm per token: its input and its statistics."""
    statistics = 2 if config.family == "gpt2" else 1
    return (config.hidden_size + statistics) * workload.full_bytes


def _saved_per_token(config: ModelConfig, workload: Workload) -> int:
    """Bytes that one block saves for its backward pass, per token."""
    c, full, compute = config, workload.full_bytes, workload.compute_bytes
    heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
    saved = 2 * (_norm(c, workload) + c.hidden_size * compute)  # and the norms' results
    saved += 2 * (heads + kv_heads) * c.head_dim * compute  # q, k, v and attention's result
    saved += heads * full  # log-sum-exp of the scores
    if c.family == "qwen3":  # norms of queries and keys
        saved += (heads + kv_heads) * (c.head_dim + 1) * full
    saved += (2 if c.family == "gpt2" else 4) * c.intermediate_size * compute  # GELU, SwiGLU
    if c.dropout:
        saved += 2 * c.hidden_size  # masks, a byte each
    return saved


def _saved_outside_blocks(config: ModelConfig, workload: Workload) -> int:
    """Bytes of the token ids, the last norm, and the tables of rotary positions."""
    per_token = 8 + _norm(config, workload) + (config.hidden_size if config.dropout else 0)
    tables = 0
    if config.family != "gpt2":
        tables = 2 * config.max_position_embeddings * config.head_dim * workload.full_bytes
    return workload.tokens * per_token + tables


def _loss(config: ModelConfig, workload: Workload) -> int:
    """Bytes at the loss: the gradients that it makes at once, and a chunk of logits or, backward,
    those gradients scaled."""
    full, compute = workload.full_bytes, workload.compute_bytes
    mixed = compute < full  # a cast is a copy
    head, hidden = config.vocab_size * config.hidden_size, workload.tokens * config.hidden_size
    rows = max(128, GPU_LOGITS_BYTES // (4 * config.vocab_size) // 128 * 128)
    rows = min(rows, workload.tokens)
    chunk = rows * config.vocab_size
    softmax = chunk * (2 * full + mixed * compute)
    product = chunk * compute + (head + rows * config.hidden_size) * compute
    forward = max(softmax, product) + mixed * head * compute
    backward = head * (full + mixed * compute)
    return head * full + 2 * hidden * compute + max(forward, backward)


def _backward_of_block(config: ModelConfig, workload: Workload) -> int:
    """Bytes that a block's backward pass adds to what its forward pass saved, in its MLP."""
    c, full, compute = config, workload.full_bytes, workload.compute_bytes
    inner = (1 if c.family == "gpt2" else 2) * c.intermediate_size * compute
    matrix = c.intermediate_size * c.hidden_size  # the largest
    passing = workload.tokens * (inner + c.hidden_size * full) + matrix * compute
    if not workload.sharded:
        return passing + (matrix * full if compute < full else 0)
    # The head's gradient waits for the end.
    return passing + c.vocab_size * c.hidden_size * full + _coming(c, workload)


def _coming(config: ModelConfig, workload: Workload) -> int:
    """Bytes of the next block's weights, which are on their way during a block's backward pass."""
    if not workload.sharded or workload.strategy == "zero2":
        return 0
    return _count(parameter_shapes(config)[0]) * workload.compute_bytes


def _muon_traffic(config: ModelConfig, shards: int) -> int:
    """Bytes of distributed/parallel.py: over_whole_matrices: each batch of matrices of one shape
    goes to the ranks that work on them and back, in bf16, padded to the same number for each."""
    block, _ = parameter_shapes(config)
    sent = 0
    for (rows, columns), in_block in Counter(s for s in block if len(s) == 2).items():
        left = in_block * config.num_hidden_layers
        batch = max(1, GPU_MUON_ELEMENTS // (rows * columns)) * shards
        while left > 0:
            matrices = -(-min(left, batch) // shards)  # of one rank
            sent += 2 * 2 * (shards - 1) * matrices * -(-rows // shards) * columns
            left -= batch
    return sent
