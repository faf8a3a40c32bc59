"""The models whose training steps are compared with the peers', and the batch."""

from minigpt_cli.model.config import ModelConfig, model_config
from minigpt_cli.model.cost import flops_per_token

BATCH, TOKENS, VOCAB = 16, 256, 4096


def shape(family: str) -> ModelConfig:
    """Return gpt2 with 12.3 M parameters, or llama with 13.8 M."""
    assert family in ("gpt2", "llama")
    return model_config(
        family=family,  # type: ignore[arg-type]
        vocab_size=VOCAB,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=TOKENS,
    )


def product_flops(config: ModelConfig, tokens: int) -> int:
    """Return the FLOPs of all matrix products that a training step can't do without, for a token.

    As ``flops_per_token`` of model/cost.py, but a query's products with later keys don't count.
    """
    width = config.num_attention_heads * config.head_dim
    masked = 6 * config.num_hidden_layers * width * tokens
    return flops_per_token(config, tokens) - masked
