"""What a forward pass saves for the backward pass, and what the loss needs, by arithmetic."""

from minigpt_cli.model.attention import CPU_MATMUL_TOKENS, QUERY_BLOCK
from minigpt_cli.model.block import ONE_PRODUCT
from minigpt_cli.model.config import ModelConfig
from minigpt_cli.model.cost import adapted_layers
from minigpt_cli.model.cross_entropy import default_chunk_tokens
from minigpt_cli.model.workload import Workload
from minigpt_cli.recipe import AdapterSettings

_BOOL, _INT64 = 1, 8  # bytes


def norm_bytes(config: ModelConfig, workload: Workload) -> int:
    """Bytes saved by a norm per token: its input and its statistics."""
    statistics = 2 if config.family == "gpt2" else 1
    return (config.hidden_size + statistics) * workload.full_bytes


def saved_per_token(config: ModelConfig, workload: Workload) -> int:
    """Bytes that one block saves for its backward pass, per token."""
    c, full, compute = config, workload.full_bytes, workload.compute_bytes
    heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
    saved = 2 * (norm_bytes(c, workload) + c.hidden_size * compute)  # and the norms' results
    saved += 2 * (heads + kv_heads) * c.head_dim * compute  # q, k, v and attention's result
    if multiplies_once(c, workload):  # the values are a part of the product, which stays whole
        saved += (heads + kv_heads) * c.head_dim * compute
    saved += _saved_by_scores(c, workload)
    if c.family == "qwen3":  # norms of queries and keys
        saved += (heads + kv_heads) * (c.head_dim + 1) * full
    saved += (2 if c.family == "gpt2" else 4) * c.intermediate_size * compute  # GELU, SwiGLU
    if c.dropout:
        saved += 2 * c.hidden_size * _BOOL
    if workload.adapter is not None:
        saved += _saved_by_adapters(c, workload.adapter, workload)
    return saved


def multiplies_once(config: ModelConfig, workload: Workload) -> bool:
    """Return whether queries, keys and values come from one product of weights put together."""
    return (
        config.family != "gpt2"
        and workload.device_type in ONE_PRODUCT
        and workload.compute_bytes < workload.full_bytes
        and not workload.sharded
        and workload.adapter is None
    )


def _has_mask(config: ModelConfig, workload: Workload) -> bool:
    """Return whether sequences are packed and need a mask, as without ``has_varlen``.

    The conditions are those of model/attention.py, for a GPU of the Ampere generation or later.
    """
    c, w = config, workload
    varlen = w.device_type == "cuda" and w.compute_bytes == 2 and not c.dropout
    return w.packed and not (varlen and c.head_dim % 8 == 0 and c.head_dim <= 256)


def kept_per_token(config: ModelConfig, workload: Workload) -> tuple[int, int]:
    """Bytes that one block keeps of its products when it recomputes the rest, per token.

    Returns:
        (what is kept beside the block's input, the part of it that takes no memory of its own once
        the block is recomputed). The products of model/recompute.py.
    """
    c, w = config, workload
    heads, kv_heads, is_gpt2 = c.num_attention_heads, c.num_key_value_heads, c.family == "gpt2"
    projected = (heads + 2 * kv_heads) * c.head_dim
    inner = (1 if is_gpt2 else 2) * c.intermediate_size
    kept = (projected + inner + 2 * c.hidden_size) * w.compute_bytes
    # Queries and keys are saved after their rotation.
    whole = is_gpt2 or multiplies_once(c, w)
    also = ((projected if whole else kv_heads * c.head_dim) + inner) * w.compute_bytes
    if is_gpt2 and w.device_type == "cpu" and w.compute_bytes == 2:
        also -= inner * w.compute_bytes  # model/gelu.py saves the derivative, not its input
    if w.adapter is not None:
        layers = adapted_layers(c, w.adapter)
        kept += sum(w.adapter.rank + outside for _, outside in layers) * w.compute_bytes
        # An adapter's result is added to its layer's, and only the sum is saved: both are freed
        # while the block is recomputed.
        also = kept
    if not c.dropout and (w.adapter is None or not w.adapter.dropout):  # else attention isn't kept
        result = heads * c.head_dim * w.compute_bytes
        kept += result
        if w.device_type != "cpu" or w.packed or w.sequence_length > CPU_MATMUL_TOKENS:
            statistics = heads * w.full_bytes
            kept, also = kept + statistics, also + result + statistics
    return kept, also


def _saved_by_scores(config: ModelConfig, workload: Workload) -> int:
    """Bytes that attention saves of its scores, per token."""
    c, length, compute = config, workload.sequence_length, workload.compute_bytes
    heads, on_cpu = c.num_attention_heads, workload.device_type == "cpu"
    saved = heads * workload.full_bytes  # flash attention: log-sum-exp
    if _has_mask(c, workload):
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


def saved_outside_blocks(config: ModelConfig, workload: Workload) -> int:
    """Bytes of the token ids, the last norm, the tables of rotary positions, and the mask."""
    per_token = (
        _INT64 + norm_bytes(config, workload) + (config.hidden_size if config.dropout else 0)
    )
    if _has_mask(config, workload):
        per_token += workload.sequence_length * _BOOL
    tables = 0
    if config.family != "gpt2":
        length = workload.sequence_length
        rows = min(config.max_position_embeddings, max(4096, 1 << (length - 1).bit_length()))
        tables = 2 * rows * config.head_dim * workload.full_bytes
    return workload.tokens * per_token + tables


def loss_bytes(config: ModelConfig, workload: Workload) -> int:
    """Bytes at the loss: the gradients that it makes at once, and a chunk of logits or, backward,
    those gradients scaled."""
    full, compute = workload.full_bytes, workload.compute_bytes
    mixed = compute < full  # a cast is a copy
    head, hidden = config.vocab_size * config.hidden_size, workload.tokens * config.hidden_size
    rows = default_chunk_tokens(workload.device_type, config.vocab_size, workload.tokens)
    chunk = rows * config.vocab_size
    gradient = 0 if workload.adapter is not None else head  # a frozen head has none
    before = gradient * full if rows < workload.tokens else 0  # of the chunks before
    softmax = chunk * (2 * full + mixed * compute) + before
    # On a CPU a product in bf16 is a tensor of its own before it is added up.
    on_cpu = mixed and workload.device_type == "cpu"
    product = chunk * compute + gradient * (full + on_cpu * compute)
    forward = max(softmax, product) + hidden * compute + mixed * head * compute
    backward = 2 * gradient * full
    return 2 * hidden * compute + max(forward, backward)
