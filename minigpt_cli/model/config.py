"""The shape of a model, in the names of Hugging Face's ``config.json``."""

import dataclasses
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from minigpt_cli.core.errors import UserError
from minigpt_cli.recipe import ModelSettings, Recipe, RopeScaling, out_of_range

Family = Literal["gpt2", "llama", "qwen3"]
T = TypeVar("T")

VOCABULARY_MULTIPLE = 128  # rows of embeddings: GPUs multiply aligned matrices faster


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a transformer, and its dropout.

    ``gpt2`` is GPT2LMHeadModel (learned positions, LayerNorm with bias, GELU), ``llama`` is
    LlamaForCausalLM (RMSNorm, RoPE, SwiGLU, grouped-query attention) and ``qwen3`` is
    Qwen3ForCausalLM (llama with RMSNorm on each head's queries and keys).
    """

    family: Family
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    rope_theta: float
    norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool  # always true for gpt2
    mlp_bias: bool
    initializer_range: float
    dropout: float
    rope_scaling: RopeScaling | None = None


def model_config(
    *,
    family: Family,
    vocab_size: int,
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    max_position_embeddings: int,
    num_key_value_heads: int | None = None,
    head_dim: int | None = None,
    intermediate_size: int | None = None,
    rope_theta: float | None = None,
    norm_eps: float | None = None,
    tie_word_embeddings: bool | None = None,
    attention_bias: bool | None = None,
    mlp_bias: bool | None = None,
    initializer_range: float = 0.02,
    dropout: float = 0.0,
    rope_scaling: RopeScaling | None = None,
) -> ModelConfig:
    """Build a config: fill in defaults as transformers does for the family, and check all values.

    Raises:
        UserError: sizes don't fit together; all problems in one message.
    """
    gpt2 = family == "gpt2"
    config = ModelConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=_given(num_key_value_heads, num_attention_heads),
        head_dim=_given(head_dim, hidden_size // max(1, num_attention_heads)),
        # Two matrices of 4h, or SwiGLU's three of 8h/3 (Shazeer 2020), rounded up to whole tiles.
        intermediate_size=_given(
            intermediate_size, 4 * hidden_size if gpt2 else -(-8 * hidden_size // (3 * 64)) * 64
        ),
        max_position_embeddings=max_position_embeddings,
        rope_theta=_given(rope_theta, 10_000.0),
        norm_eps=_given(norm_eps, 1e-5 if family != "qwen3" else 1e-6),
        tie_word_embeddings=_given(tie_word_embeddings, gpt2),
        attention_bias=_given(attention_bias, gpt2),
        mlp_bias=_given(mlp_bias, gpt2),
        initializer_range=initializer_range,
        dropout=dropout,
        rope_scaling=rope_scaling,
    )
    problems = _problems(config)
    if head_dim is None and hidden_size % max(1, num_attention_heads):
        problems.insert(
            0,
            f"hidden_size {hidden_size} is not a multiple of num_attention_heads "
            f"{num_attention_heads}",
        )
    if problems:
        raise UserError("[model] " + "; ".join(problems))
    return config


def _given(value: T | None, default: T) -> T:
    """Return ``default`` for None only: a 0 must reach the checks."""
    return default if value is None else value


def padded_vocabulary(size: int) -> int:
    """Return the rows of embeddings of a new model whose tokenizer has ``size`` entries."""
    return -(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def with_vocabulary(recipe: Recipe, vocab_size: int) -> Recipe:
    """Set ``model.vocab_size`` for a new model, unless the recipe or its base gives it.

    The run's recipe.toml then holds it. A run without it, of an earlier version, has the
    tokenizer's size, see ``config_from_recipe``.

    Args:
        recipe: completed by the base model, if it has one.
        vocab_size: the tokenizer's.
    """
    if recipe.model.vocab_size is not None:
        return recipe
    return replace(
        recipe,
        model=replace(recipe.model, vocab_size=padded_vocabulary(vocab_size)),
        origin={**recipe.origin, "model.vocab_size": "default"},
    )


def config_from_recipe(recipe: Recipe, vocab_size: int) -> ModelConfig:
    """Build the config of a recipe's ``[model]``.

    Args:
        vocab_size: the tokenizer's; the model's too if the recipe doesn't give another one.

    Raises:
        UserError: sizes don't fit together, or the vocabulary is smaller than the tokenizer's.
    """
    fields = dataclasses.fields(recipe.model)
    settings = {f.name: getattr(recipe.model, f.name) for f in fields if f.name != "init_from"}
    settings["max_position_embeddings"] = _given(
        recipe.model.max_position_embeddings, recipe.train.sequence_length
    )
    settings["vocab_size"] = _given(recipe.model.vocab_size, vocab_size)
    if settings["vocab_size"] < vocab_size:
        raise UserError(
            f"[model] vocab_size {settings['vocab_size']} is too small: the tokenizer of "
            f"{recipe.data_path} has {vocab_size} entries; leave it out, or set {vocab_size} or "
            "more"
        )
    return model_config(**settings)


def _problems(config: ModelConfig) -> list[str]:
    found = [f"{name}: {problem}" for name, problem in out_of_range(ModelSettings, config)]
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if kv_heads > 0 and heads % kv_heads:
        found.append(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    if config.family == "gpt2":
        if kv_heads != heads:
            found.append(
                "family gpt2 has no grouped-query attention: leave out num_key_value_heads"
            )
        if config.head_dim * heads != config.hidden_size:
            found.append("family gpt2 needs head_dim = hidden_size / num_attention_heads")
        if not (config.attention_bias and config.mlp_bias):
            found.append("family gpt2 always has biases: leave out attention_bias and mlp_bias")
        if config.rope_scaling is not None:
            found.append("family gpt2 has no rotary positions: leave out rope_scaling")
    elif config.head_dim % 2:
        found.append(f"rotary positions need an even head_dim, not {config.head_dim}")
    if config.family == "qwen3" and config.mlp_bias:
        found.append("family qwen3 has no mlp_bias")
    return found + _scaling_problems(config.rope_scaling)


def _scaling_problems(scaling: RopeScaling | None) -> list[str]:
    if scaling is None:
        return []
    found = [
        f"rope_scaling.{name}: {problem}" for name, problem in out_of_range(RopeScaling, scaling)
    ]
    if scaling.factor is None:  # possible in a config.json
        found.append(f"rope_scaling of rope_type {scaling.rope_type} needs factor")
    for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        missing = getattr(scaling, name) is None
        if missing == (scaling.rope_type == "llama3"):
            needs = "needs" if missing else "has no"
            found.append(f"rope_scaling of rope_type {scaling.rope_type} {needs} {name}")
    if not found and scaling.rope_type == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        assert low is not None
        assert high is not None
        if low >= high:
            found.append(
                f"rope_scaling.low_freq_factor {low} must be below high_freq_factor {high}"
            )
    return found
