"""Memory of one training step on a device, by arithmetic.

The strategies are those of distributed/parallel.py. ``ddp`` keeps everything on every device.
``fsdp`` shards weights, gradients and optimizer state, and gathers the weights of one block at a
time (ZeRO-3, Rajbhandari et al. 2020), also those of an untied embedding or output projection.
``zero2`` keeps gathered weights until the backward pass. ``hsdp`` is fsdp within groups of
``shard_size`` devices; all groups hold the same. Activations are those of eager kernels: flash
attention on a GPU, the kernels of model/attention.py on a CPU.
docs/scale.md has tables of it, docs/plan.md says how close it comes.
"""

from collections import Counter
from dataclasses import dataclass

from minigpt_cli.core.constants import MUON_ELEMENTS
from minigpt_cli.model.activations import (
    kept_per_token,
    loss_bytes,
    norm_bytes,
    saved_outside_blocks,
    saved_per_token,
)
from minigpt_cli.model.config import ModelConfig
from minigpt_cli.model.cost import ParameterShapes, count_elements, parameter_shapes
from minigpt_cli.model.workload import Workload
from minigpt_cli.recipe import AdapterSettings

# A process that trains on a CPU, above one that has imported torch: the other libraries' modules
# (55 MB), and the code and buffers of kernels (50 MB).
PROCESS_BYTES = 105_000_000
# What comes and goes leaves holes in glibc's heap, which small objects of Python and C++ keep open:
# 1.26 to 1.91 times its size on nine models, by chance (benchmarks/LOG.md).
_HEAP_FACTOR = 1.5


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


def bytes_needed(config: ModelConfig, workload: Workload) -> int:
    """Return the bytes to compare with a device's memory.

    On a GPU those of its tensors, on a CPU those of the process.
    """
    memory = device_memory_needed(config, workload)
    return process_peak(memory) if workload.device_type == "cpu" else memory.peak


def process_peak(memory: Memory) -> int:
    """Estimate the bytes of a process that trains on a CPU, above one that has imported torch.

    Without the heap's holes it would be ``memory.peak + PROCESS_BYTES``.

    Args:
        memory: of its tensors.
    """
    lasting = memory.parameters + memory.optimizer
    return PROCESS_BYTES + lasting + round(_HEAP_FACTOR * (memory.peak - lasting))


def device_memory_needed(config: ModelConfig, workload: Workload) -> Memory:
    """Compute what a device needs for one step.

    On top come the CUDA context, the communication library's buffers and the allocator's fragments.
    """
    c, w, full = config, workload, workload.full_bytes
    layers, shapes = c.num_hidden_layers, parameter_shapes(c, w.adapter)
    block, outside = count_elements(shapes.block), count_elements(shapes.outside)
    whole = layers * block + outside
    shard = layers * count_elements(shapes.block, w.shards) + count_elements(
        shapes.outside, w.shards
    )
    parameters = shard * full + _frozen_bytes(c, w, shapes)
    optimizer = optimizer_elements(c, w.optimizer, w.shards, w.adapter) * full

    gathered = _gathered(c, w, shapes)
    has_whole = not w.sharded or (w.accumulation > 1 and w.whole_gradients)
    gradients = (whole if has_whole else shard) * full
    saved, entering = w.tokens * saved_per_token(c, w), w.tokens * c.hidden_size * full
    kept, recomputed = saved, 0
    if w.activation_checkpointing:
        kept, recomputed = entering, saved - entering
    if w.activation_checkpointing == "selective":
        products, also_saved = kept_per_token(c, w)
        kept, recomputed = kept + w.tokens * products, recomputed - w.tokens * also_saved
    activations = layers * kept + saved_outside_blocks(c, w)
    loss = loss_bytes(c, w)
    backward = _backward_of_block(c, w, shapes) + recomputed

    # DDP's buckets always live; elsewhere a step begins without gradients.
    early = gradients if w.strategy == "ddp" or w.accumulation > 1 else 0
    leaving = block * full if w.sharded else 0  # a block's gradients, copied to be scattered
    # The copy takes the place of what was added up.
    first_leaving = 0 if early and has_whole else leaving
    has_own_head = w.sharded and not c.tie_word_embeddings and w.adapter is None  # with a gradient
    own_head = c.vocab_size * c.hidden_size if has_own_head else 0
    head_leaving = 0 if has_whole else own_head * full
    # In the last block's backward pass its own gradients don't exist yet, nor do the embeddings',
    # or the head's is still counted as waiting.
    alone = w.strategy == "single" and w.accumulation == 1
    missing = (block + c.vocab_size * c.hidden_size) * full if alone and w.adapter is None else 0
    if w.activation_checkpointing and not w.sharded:  # autocast's copies are of one block alone
        missing += gathered.backward * (layers - 1) // layers
    moments = (
        early + activations + loss + gathered.at_loss - gathered.backward,
        early + activations + backward + head_leaving,  # the last block
        early
        + activations
        - kept
        - w.tokens * norm_bytes(c, w)
        + backward
        + first_leaving,  # a block later
        gradients - missing + kept + backward - _coming(w, shapes) + leaving,  # the last block
        gradients + (outside - own_head) * full * (2 if w.sharded else 1),  # the embeddings
    )
    update = gradients + _optimizer_scratch(w, shapes, layers)
    peak = parameters + optimizer + max(gathered.backward + max(moments), update)
    most = max(gathered.at_loss, gathered.backward)
    return Memory(parameters, gradients, optimizer, most, activations, loss, backward, peak)


@dataclass(frozen=True)
class _Gathered:
    """Bytes of weights for computing."""

    at_loss: int
    backward: int  # in the backward pass of the blocks, without the next block's


def _gathered(config: ModelConfig, workload: Workload, shapes: ParameterShapes) -> _Gathered:
    """Weights for computing: a block's in the compute dtype, those outside the blocks in full."""
    c, w, layers = config, workload, config.num_hidden_layers
    if not w.sharded:
        # Autocast's copies of the blocks' matrices live until the backward pass has used them.
        copies = layers * count_elements(shapes.matrices) * w.compute_bytes
        copies = copies if w.compute_bytes < w.full_bytes else 0
        return _Gathered(copies, copies)
    block = shapes.block + shapes.frozen_linear + shapes.frozen_norms
    one_block = count_elements(block) * w.compute_bytes
    blocks = layers * one_block if w.strategy == "zero2" else 0  # that stay for the backward pass
    outside = count_elements(shapes.outside + shapes.frozen_outside) * w.full_bytes
    if c.tie_word_embeddings:
        return _Gathered(outside + blocks + one_block, outside + blocks + one_block)
    # FSDP keeps the buffer in which weights arrived until the next ones have: the head's at the
    # loss. The embedding has gone by then.
    head = c.vocab_size * c.hidden_size * w.full_bytes
    rest = outside - 2 * head
    return _Gathered(rest + 2 * head + blocks, rest + (blocks or one_block))


def optimizer_elements(
    config: ModelConfig, optimizer: str, shards: int = 1, adapter: AdapterSettings | None = None
) -> int:
    """Count the numbers that the optimizer keeps on a device.

    AdamW has two for each weight. Muon has one for each of the blocks' matrices, and leaves the
    other weights to AdamW.
    """
    shapes, layers = parameter_shapes(config, adapter), config.num_hidden_layers
    elements = 2 * (
        layers * count_elements(shapes.block, shards) + count_elements(shapes.outside, shards)
    )
    if optimizer == "muon":
        elements -= layers * count_elements(shapes.matrices, shards)
    return elements


def _frozen_bytes(config: ModelConfig, workload: Workload, shapes: ParameterShapes) -> int:
    """Bytes of frozen weights on a device: the blocks' linear layers in the compute dtype."""
    w, layers = workload, config.num_hidden_layers
    linear = layers * count_elements(shapes.frozen_linear, w.shards)
    rest = layers * count_elements(shapes.frozen_norms, w.shards)
    rest += count_elements(shapes.frozen_outside, w.shards)
    return linear * w.compute_bytes + rest * w.full_bytes


def _backward_of_block(config: ModelConfig, workload: Workload, shapes: ParameterShapes) -> int:
    """Bytes that a block's backward pass adds to what its forward pass saved, in its MLP."""
    c, full, compute = config, workload.full_bytes, workload.compute_bytes
    inner = (1 if c.family == "gpt2" else 2) * c.intermediate_size * compute
    matrix = 0 if workload.adapter is not None else c.intermediate_size * c.hidden_size
    passing = workload.tokens * (inner + c.hidden_size * full) + matrix * compute
    head = 0 if workload.adapter is not None else c.vocab_size * c.hidden_size * full
    if not workload.sharded:
        # DDP has the head's gradient in a bucket already, unless the embeddings add to it.
        waits = workload.strategy == "single" or c.tie_word_embeddings
        accumulated = workload.accumulation > 1 and not c.tie_word_embeddings
        return (
            passing
            + (matrix * full if compute < full else 0)
            + (head if waits and not accumulated else 0)
        )
    # A tied head's gradient waits for the embedding's.
    waiting = head if c.tie_word_embeddings else 0
    return passing + waiting + _coming(workload, shapes)


def _coming(workload: Workload, shapes: ParameterShapes) -> int:
    """Bytes of the next block's weights, which are on their way during a block's backward pass."""
    if not workload.sharded or workload.strategy == "zero2":
        return 0
    block = shapes.block + shapes.frozen_linear + shapes.frozen_norms
    return count_elements(block) * workload.compute_bytes


def _optimizer_scratch(workload: Workload, shapes: ParameterShapes, layers: int) -> int:
    """Bytes of Muon's batch of matrices: float32 gradients, momenta and updates, bf16 products.

    The fused AdamW needs none.
    """
    if workload.optimizer != "muon":
        return 0
    budget = MUON_ELEMENTS[workload.device_type]
    most = 0
    for (rows, columns), in_block in Counter(shapes.matrices).items():
        size = rows * columns
        most = max(most, min(in_block * layers, max(1, budget // size)) * size)
    return most * 4 * 4
