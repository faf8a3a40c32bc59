"""Random models of transformers' in directories, as a user would download them."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZE = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 48}
ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 24}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 48, "n_positions": 96},
    "gpt2-untied": {
        "model_type": "gpt2", "n_layer": 1, "n_head": 3, "n_embd": 48, "n_positions": 64,
        "tie_word_embeddings": False, "n_inner": 80, "activation_function": "gelu_pytorch_tanh",
    },
    "llama": SIZE | {"model_type": "llama", "intermediate_size": 64, "num_key_value_heads": 2,
                     "max_position_embeddings": 96},
    "llama-biases-tied": SIZE | {
        "model_type": "llama", "intermediate_size": 72, "num_key_value_heads": 1, "head_dim": 16,
        "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
        "max_position_embeddings": 96, "rms_norm_eps": 1e-3,
    },
    "llama-3-angles": SIZE | {"model_type": "llama", "intermediate_size": 64,
                              "rope_parameters": ROPE, "max_position_embeddings": 96},
    "llama-linear-angles": SIZE | {
        "model_type": "llama", "intermediate_size": 64, "max_position_embeddings": 96,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5},
    },
    "qwen3": SIZE | {"model_type": "qwen3", "intermediate_size": 64, "num_key_value_heads": 2,
                     "head_dim": 24, "max_position_embeddings": 96},
    "qwen3-tied-biases": SIZE | {
        "model_type": "qwen3", "intermediate_size": 64, "num_key_value_heads": 4, "head_dim": 12,
        "tie_word_embeddings": True, "attention_bias": True, "max_position_embeddings": 96,
    },
}  # fmt: skip


def random_model(shape: str, vocab_size: int = 320) -> Any:
    """Norms and biases random, too: ones and zeros would hide a mistake."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        **SHAPES[shape], vocab_size=vocab_size, initializer_range=0.2, bos_token_id=256,
        eos_token_id=256,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.float().eval()


def saved_model(shape: str, folder: Path, data: Path, **how: Any) -> tuple[Any, Path]:
    model = random_model(shape)
    model.save_pretrained(folder, **how)
    (folder / "tokenizer.json").write_bytes((data / "tokenizer.json").read_bytes())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>",
                "chat_template": "{{ messages[0].content }}"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return model, folder
