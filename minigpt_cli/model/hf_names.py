"""Configuration and names to and from transformers' GPT-2, Llama and Qwen3."""

from dataclasses import asdict
from typing import Any

from minigpt_cli.core.errors import UserError
from minigpt_cli.model.config import Family, ModelConfig, model_config
from minigpt_cli.recipe import RopeScaling

# Ours -> GPT-2's. Its linear layers are Conv1D: the same matrix, stored transposed.
_GPT2 = {
    "embed_tokens": "transformer.wte",
    "embed_positions": "transformer.wpe",
    "norm": "transformer.ln_f",
    "input_layernorm": "ln_1",
    "self_attn.qkv_proj": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
_CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def huggingface_name(config: ModelConfig, name: str) -> str:
    """Return transformers' name of our parameter ``name``."""
    if config.family != "gpt2" or name.startswith("lm_head."):
        return name if name.startswith("lm_head.") else f"model.{name}"
    module, _, leaf = name.rpartition(".")
    if module.startswith("layers."):
        _, layer, rest = module.split(".", 2)
        return f"transformer.h.{layer}.{_GPT2[rest]}.{leaf}"
    return f"{_GPT2[module]}.{leaf}"


def is_transposed(config: ModelConfig, name: str) -> bool:
    """Tell whether transformers stores this matrix as (in, out); we store (out, in)."""
    return config.family == "gpt2" and name.endswith("_proj.weight")


def huggingface_config(
    config: ModelConfig, special_tokens: dict[str, Any] | None = None, dtype: str = "float32"
) -> dict[str, Any]:
    """Build the ``config.json`` that transformers reads.

    Args:
        special_tokens: ``eos_token_id``, ``bos_token_id``, ``pad_token_id``.
        dtype: of the stored weights.
    """
    c = config
    common: dict[str, Any] = {
        "architectures": [_CLASSES[c.family]],
        "model_type": c.family,
        "vocab_size": c.vocab_size,
        "tie_word_embeddings": c.tie_word_embeddings,
        # transformers refuses larger values.
        "initializer_range": min(c.initializer_range, 1.0),
        "dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": None,
        **(special_tokens or {}),
    }
    if c.family == "gpt2":
        return common | {
            "n_embd": c.hidden_size,
            "n_layer": c.num_hidden_layers,
            "n_head": c.num_attention_heads,
            "n_inner": c.intermediate_size,
            "n_positions": c.max_position_embeddings,
            "layer_norm_epsilon": c.norm_eps,
            "activation_function": "gelu_new",
            "attn_pdrop": c.dropout,
            "embd_pdrop": c.dropout,
            "resid_pdrop": c.dropout,
        }
    scaling = {} if c.rope_scaling is None else _without_none(asdict(c.rope_scaling))
    rope = {"rope_type": "default", **scaling}
    return common | {
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.intermediate_size,
        "max_position_embeddings": c.max_position_embeddings,
        # transformers 4 and most other readers know the first two, transformers 5 the third.
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling or None,
        "rope_parameters": {**rope, "rope_theta": c.rope_theta},
        "rms_norm_eps": c.norm_eps,
        "hidden_act": "silu",
        "attention_bias": c.attention_bias,
        **({"mlp_bias": c.mlp_bias} if c.family == "llama" else {}),
        "attention_dropout": c.dropout,
    }


# --- reading what others wrote -------------------------------------------------------------------

# transformers leaves its own defaults out of config.json.
_GPT2_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "norm_eps",
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": 50257, "hidden_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 12, "intermediate_size": None, "max_position_embeddings": 1024,
        "norm_eps": 1e-5, "tie_word_embeddings": True,
    },
    "llama": {
        "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None,
        "intermediate_size": 11008, "max_position_embeddings": 2048, "norm_eps": 1e-6,
        "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    },
    "qwen3": {
        "vocab_size": 151936, "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
        "intermediate_size": 22016, "max_position_embeddings": 32768, "norm_eps": 1e-6,
        "tie_word_embeddings": False, "attention_bias": False,
    },
}  # fmt: skip
# Other keys of a config.json, and the values that our model supports. A missing key is fine.
_COMPUTED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "hidden_act": ("silu", "swish"),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}
_TOO_LARGE = 1 << 40  # for any size of a model
_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def config_from_huggingface(settings: dict[str, Any], where: str) -> ModelConfig:
    """Build our config from a ``config.json``. Dropout is 0: it belongs to training.

    Raises:
        UserError: an unsupported family, or unsupported variants of one; all in one message.
    """
    family: Any = settings.get("model_type")
    if family not in list(_DEFAULTS):  # its value may be unhashable
        raise UserError(
            f"{where}: model_type {family} is not supported; supported are {', '.join(_DEFAULTS)}"
        )
    problems = [
        f"{name} {settings[name]!r:.80}"
        for name, computed in _COMPUTED.items()
        if name in settings and settings[name] not in computed
    ]
    try:
        shape = _shape(family, settings, problems)
        if problems:
            raise UserError(f"minigpt does not support {family} with {'; '.join(problems)}")
        return model_config(family=family, **shape)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('[model] ')}") from None
    # E.g. a string instead of a number
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{where}: not the configuration of a model: {error}") from None


def _shape(family: Family, settings: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Translate the settings to our names; add what is not supported to ``problems``."""
    given = {_GPT2_NAMES.get(name, name): value for name, value in settings.items()}
    if "rms_norm_eps" in given:
        given["norm_eps"] = given["rms_norm_eps"]
    shape = {name: given.get(name, default) for name, default in _DEFAULTS[family].items()}
    for name, default in _DEFAULTS[family].items():
        if type(shape[name]) not in (type(default), int, type(None)) or (
            type(default) is int and isinstance(shape[name], bool)
        ):
            raise TypeError(f"{name} {shape[name]!r:.80}")
        if isinstance(shape[name], int) and shape[name] >= _TOO_LARGE:
            raise ValueError(f"{name} is {shape[name]:.3g}")
    shape["initializer_range"] = float(given.get("initializer_range", 0.02))
    if family == "gpt2":
        return shape
    rope: Any = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", settings.get("rope_theta"))
    shape["rope_theta"] = 10_000.0 if theta is None else float(theta)
    if kind not in ("default", "linear", "llama3") or rope.get("partial_rotary_factor", 1) != 1:
        problems.append(f"rope_parameters {rope}")
    elif kind != "default":
        names = _SCALING if kind == "llama3" else _SCALING[:1]
        scaling = {name: rope.get(name) for name in names}
        shape["rope_scaling"] = RopeScaling(kind, **scaling)
    return shape


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
