"""Memory of one training step on a device, by arithmetic.

The strategies are those of distributed/parallel.py. ``ddp`` keeps everything on every device.
``fsdp`` shards weights, gradients and optimizer state, and gathers the weights of one block at a
time (ZeRO-3, Rajbhandari et al. 2020). ``zero2`` keeps gathered weights until the backward pass.
``hsdp`` is fsdp within groups of ``shard_size`` devices; all groups hold the same. Activations are
those of eager kernels: flash attention on a GPU, the kernels of model/attention.py on a CPU.
docs/scale.md has tables of it, docs/plan.md says how close it comes.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal, get_args

from minigpt_cli.core.constants import MUON_ELEMENTS
from minigpt_cli.model.attention import CPU_MATMUL_TOKENS, QUERY_BLOCK
from minigpt_cli.model.config import ModelConfig, config_from_recipe
from minigpt_cli.model.cost import (
    ParameterShapes,
    adapted_layers,
    count_elements,
    parameter_shapes,
)
from minigpt_cli.model.cross_entropy import default_chunk_tokens
from minigpt_cli.recipe import AdapterSettings, Recipe

Strategy = Literal["single", "ddp", "zero2", "fsdp", "hsdp"]
_FP32, _BOOL, _INT64 = 4, 1, 8  # bytes

# A process that trains on a CPU, above one that has imported torch: the other libraries' modules
# (55 MB), and the code and buffers of kernels (50 MB).
PROCESS_BYTES = 105_000_000
# What comes and goes leaves holes in glibc's heap, which small objects of Python and C++ keep open:
# 1.26 to 1.91 times its size on nine models, by chance (benchmarks/LOG.md).
_HEAP_FACTOR = 1.5


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
        packed: whether sequences hold several examples, which needs an attention mask.
    """

    strategy: Strategy
    world_size: int
    micro_batch_size: int
    sequence_length: int
    accumulation: int = 1
    shard_size: int | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"
    compute_bytes: int = 2
    activation_checkpointing: bool = False
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


def predicted_peak(
    recipe: Recipe,
    vocab_size: int,
    world_size: int,
    device_type: str,
    *,
    strategy: str | None = None,
    shard_size: int | None = None,
    compute_bytes: int | None = None,
) -> Memory:
    """Predict the memory of a recipe's training step on each device.

    Args:
        recipe: with the whole ``[model]``; a base model's sizes are filled in.
        vocab_size: the tokenizer's.
        world_size, device_type, compute_bytes: see ``workload_of``.
        strategy: of ParallelDims; default: the recipe's, where ``auto`` counts as ddp.
        shard_size: for hsdp, if the recipe has none.

    Returns:
        Bytes of tensors. What a process holds beside them isn't in it (docs/plan.md).

    Raises:
        UserError: the model's sizes don't fit together.
    """
    if strategy is None:
        chosen = recipe.distributed.strategy
        strategy = "single" if world_size == 1 else "ddp" if chosen == "auto" else chosen
    assert strategy in get_args(Strategy)
    config = config_from_recipe(recipe, vocab_size)
    workload = workload_of(
        recipe,
        world_size,
        device_type,
        strategy,  # type: ignore[arg-type]
        shard_size=shard_size,
        compute_bytes=compute_bytes,
    )
    return device_memory_needed(config, workload)


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
    c, w, full, compute = config, workload, workload.full_bytes, workload.compute_bytes
    layers, shapes = c.num_hidden_layers, parameter_shapes(c, w.adapter)
    block, outside = count_elements(shapes.block), count_elements(shapes.outside)
    whole = layers * block + outside
    shard = layers * count_elements(shapes.block, w.shards) + count_elements(
        shapes.outside, w.shards
    )
    parameters = shard * full + _frozen_bytes(c, w, shapes)
    optimizer = optimizer_elements(c, w.optimizer, w.shards, w.adapter) * full

    frozen_block = count_elements(shapes.frozen_linear + shapes.frozen_norms) * compute
    outside_blocks = (outside + count_elements(shapes.frozen_outside)) * full
    if not w.sharded:
        # Autocast's copies of the blocks' matrices live until the backward pass has used them.
        gathered = layers * count_elements(shapes.matrices) * compute if compute < full else 0
    elif w.strategy == "zero2":
        gathered = outside_blocks + (layers + 1) * (block * compute + frozen_block)
    else:  # a block at a time; what is outside the blocks stays, and in float32
        gathered = outside_blocks + block * compute + frozen_block

    # FSDP adds up whole gradients until the last micro-batch lets it scatter them.
    gradients = (whole if not w.sharded or w.accumulation > 1 else shard) * full
    saved, entering = w.tokens * _saved_per_token(c, w), w.tokens * c.hidden_size * full
    kept, recomputed = (entering, saved - entering) if w.activation_checkpointing else (saved, 0)
    activations = layers * kept + _saved_outside_blocks(c, w)
    loss = _loss(c, w)
    backward = _backward_of_block(c, w, shapes) + recomputed

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
        gradients + kept + backward - _coming(w, shapes) + leaving,  # the last block to be passed
        gradients + outside * full * (2 if w.sharded else 1),  # the embeddings
    )
    update = gradients + _optimizer_scratch(w, shapes, layers) - gathered
    peak = parameters + optimizer + gathered + max(*moments, update)
    return Memory(parameters, gradients, optimizer, gathered, activations, loss, backward, peak)


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
    saved += _saved_by_scores(c, workload)
    if c.family == "qwen3":  # norms of queries and keys
        saved += (heads + kv_heads) * (c.head_dim + 1) * full
    saved += (2 if c.family == "gpt2" else 4) * c.intermediate_size * compute  # GELU, SwiGLU
    if c.dropout:
        saved += 2 * c.hidden_size * _BOOL
    if workload.adapter is not None:
        saved += _saved_by_adapters(c, workload.adapter, workload)
    return saved


def _saved_by_scores(config: ModelConfig, workload: Workload) -> int:
    """Bytes that attention saves of its scores, per token."""
    c, length, compute = config, workload.sequence_length, workload.compute_bytes
    heads, on_cpu = c.num_attention_heads, workload.device_type == "cpu"
    saved = heads * workload.full_bytes  # flash attention: log-sum-exp
    if workload.packed:
        saved += length * compute  # the mask as numbers, for all heads
        if c.num_key_value_heads < heads:  # keys and values are repeated
            saved += 2 * (heads - c.num_key_value_heads) * c.head_dim * compute
    if not on_cpu:
        return saved
    if c.dropout:  # the kernel that keeps all weights, with what dropout leaves and its mask
        return heads * length * (2 * compute + _BOOL)
    if workload.packed or length > CPU_MATMUL_TOKENS:
        return saved
    # The weights of a block of queries, without the keys that come after it.
    ends = range(QUERY_BLOCK, length + QUERY_BLOCK, QUERY_BLOCK)
    weights = sum((min(end, length) - end + QUERY_BLOCK) * min(end, length) for end in ends)
    return heads * weights * compute // length


def _saved_by_adapters(config: ModelConfig, adapter: AdapterSettings, workload: Workload) -> int:
    """Bytes that one block's adapters save, per token, beside the inputs of their layers."""
    saved = 0
    for inside, outside in adapted_layers(config, adapter):
        saved += adapter.rank * workload.compute_bytes
        if adapter.dropout:
            saved += inside * (workload.compute_bytes + _BOOL)
        if adapter.use_dora:
            saved += outside * (workload.compute_bytes + workload.full_bytes)
    return saved


def _saved_outside_blocks(config: ModelConfig, workload: Workload) -> int:
    """Bytes of the token ids, the last norm, the tables of rotary positions, and the mask."""
    per_token = _INT64 + _norm(config, workload) + (config.hidden_size if config.dropout else 0)
    if workload.packed:
        per_token += workload.sequence_length * _BOOL
    tables = 0
    if config.family != "gpt2":
        length = workload.sequence_length
        rows = min(config.max_position_embeddings, max(4096, 1 << (length - 1).bit_length()))
        tables = 2 * rows * config.head_dim * workload.full_bytes
    return workload.tokens * per_token + tables


def _loss(config: ModelConfig, workload: Workload) -> int:
    """Bytes at the loss: the gradients that it makes at once, and a chunk of logits or, backward,
    those gradients scaled."""
    full, compute = workload.full_bytes, workload.compute_bytes
    mixed = compute < full  # a cast is a copy
    head, hidden = config.vocab_size * config.hidden_size, workload.tokens * config.hidden_size
    rows = min(default_chunk_tokens(workload.device_type, config.vocab_size), workload.tokens)
    chunk = rows * config.vocab_size
    softmax = chunk * (2 * full + mixed * compute)
    gradient = 0 if workload.adapter is not None else head  # a frozen head has none
    product = chunk * compute + (gradient + rows * config.hidden_size) * compute
    forward = max(softmax, product) + mixed * head * compute
    backward = gradient * (full + mixed * compute)
    return gradient * full + 2 * hidden * compute + max(forward, backward)


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
    # The head's gradient waits for the end.
    return passing + head + _coming(workload, shapes)


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
    return most * 4 * _FP32
