"""Configuration and names to and from transformers' GPT-2, Llama and Qwen3."""

from typing import Any

from torch import Tensor

from minigpt_cli.model.config import ModelConfig

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
    """What transformers calls the parameter that we call ``name``."""
    if config.family != "gpt2" or name.startswith("lm_head."):
        return name if name.startswith("lm_head.") else f"model.{name}"
    module, _, leaf = name.rpartition(".")
    if module.startswith("layers."):
        _, layer, rest = module.split(".", 2)
        return f"transformer.h.{layer}.{_GPT2[rest]}.{leaf}"
    return f"{_GPT2[module]}.{leaf}"


def is_transposed(config: ModelConfig, name: str) -> bool:
    """Whether transformers stores this matrix (in, out) where we store (out, in)."""
    return config.family == "gpt2" and name.endswith("_proj.weight")


def to_huggingface(config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under transformers' names, in its layout."""
    return {
        huggingface_name(config, name): (
            tensor.T.contiguous() if is_transposed(config, name) else tensor
        )
        for name, tensor in weights.items()
    }


def from_huggingface(
    config: ModelConfig, names: list[str], weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The parameters that we call ``names``, taken from transformers' state dict."""
    found = {}
    for name in names:
        tensor = weights[huggingface_name(config, name)]
        found[name] = tensor.T if is_transposed(config, name) else tensor
    return found


def huggingface_config(config: ModelConfig, eos_token_id: int | None = None) -> dict[str, Any]:
    """The ``config.json`` that transformers reads."""
    c = config
    common: dict[str, Any] = {
        "architectures": [_CLASSES[c.family]],
        "model_type": c.family,
        "vocab_size": c.vocab_size,
        "tie_word_embeddings": c.tie_word_embeddings,
        "initializer_range": c.initializer_range,
        "bos_token_id": eos_token_id,
        "eos_token_id": eos_token_id,
        "dtype": "float32",
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
    return common | {
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.intermediate_size,
        "max_position_embeddings": c.max_position_embeddings,
        "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "rms_norm_eps": c.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": c.dropout,
    }
