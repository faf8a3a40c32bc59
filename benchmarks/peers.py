"""The training step of nanoGPT, litgpt and transformers; runs in the peers' environment.

    .venv-peers/bin/python -m benchmarks.peers time litgpt --dtype bf16-true --compile
    .venv-peers/bin/python -m benchmarks.peers check --nanogpt DIR

``time`` prints the seconds of each step as JSON. Each peer trains as its own script does by
default: its loss, optimizer and clipping, gradients set to None. ``check`` loads our weights into
each peer and compares the losses of one batch, and the gradients' norms, in float32.
"""

import argparse
import contextlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.shapes import BATCH, TOKENS, VOCAB, shape
from minigpt_cli.model.gpt import GPT, initialize_weights
from minigpt_cli.model.hf_names import huggingface_config, huggingface_name, is_transposed

Loss = Callable[[Any, Tensor, Tensor], Tensor]  # of a model, ids and targets
PEERS = {"nanoGPT": "gpt2", "HF": "gpt2", "litgpt": "llama"}
WARM_UP = 3
TOLERANCE = 1e-5


def nanogpt(folder: Path) -> tuple[nn.Module, Loss]:
    """Build nanoGPT's model from its directory."""
    c = shape("gpt2")
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclass
    with contextlib.redirect_stdout(sys.stderr):
        spec.loader.exec_module(module)
        model = module.GPT(
            module.GPTConfig(
                block_size=c.max_position_embeddings,
                vocab_size=c.vocab_size,
                n_layer=c.num_hidden_layers,
                n_head=c.num_attention_heads,
                n_embd=c.hidden_size,
                dropout=0.0,
                bias=True,
            )
        )
    return model, lambda model, ids, targets: model(ids, targets)[1]


def litgpt() -> tuple[nn.Module, Loss]:
    """Build litgpt's Llama."""
    from litgpt.config import Config
    from litgpt.model import GPT as LitGPT
    from litgpt.utils import chunked_cross_entropy

    c = shape("llama")
    config = Config(
        block_size=c.max_position_embeddings,
        vocab_size=c.vocab_size,
        padded_vocab_size=c.vocab_size,
        n_layer=c.num_hidden_layers,
        n_head=c.num_attention_heads,
        n_embd=c.hidden_size,
        intermediate_size=c.intermediate_size,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=c.norm_eps,
        mlp_class_name="LLaMAMLP",
    )
    return LitGPT(config), lambda model, ids, targets: chunked_cross_entropy(model(ids), targets)


def transformers_gpt2() -> tuple[nn.Module, Loss]:
    """Build transformers' GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(**huggingface_config(shape("gpt2"))))
    # The Trainer passes labels that the model shifts by itself; here they are shifted already.
    return (
        model,
        lambda model, ids, targets: (
            model(ids, labels=ids, shift_labels=targets, use_cache=False).loss
        ),
    )


def build(peer: str, folder: Path | None) -> tuple[nn.Module, Loss]:
    """Return a peer's model, in training mode, and its loss."""
    if peer == "nanoGPT":
        assert folder is not None
        model, loss = nanogpt(folder)
    else:
        model, loss = litgpt() if peer == "litgpt" else transformers_gpt2()
    return model.train(), loss


def optimizer_of(peer: str, model: Any) -> torch.optim.Optimizer:
    """Return the optimizer that the peer's own script makes on a CPU."""
    if peer == "nanoGPT":
        with contextlib.redirect_stdout(sys.stderr):
            made: torch.optim.Optimizer = model.configure_optimizers(0.1, 3e-4, (0.9, 0.95), "cpu")
        return made
    # The Trainer's default is adamw_torch_fused; litgpt uses the fused kernel on GPUs alone.
    return torch.optim.AdamW(model.parameters(), lr=3e-4, fused=peer == "HF")


def time_steps(
    peer: str, folder: Path | None, dtype: str, compiled: bool, steps: int
) -> list[float]:
    """Return the seconds of each training step on random tokens, after ``WARM_UP`` others."""
    torch.manual_seed(0)
    model, loss_of = build(peer, folder)
    if dtype == "bf16-true":
        model = model.bfloat16()
    optimizer = optimizer_of(peer, model)
    forward = torch.compile(model) if compiled else model
    tokens = torch.randint(VOCAB, (BATCH, TOKENS + 1))
    seconds = []
    for _ in range(WARM_UP + steps):
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = loss_of(forward, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        seconds.append(time.perf_counter() - began)
    return seconds[WARM_UP:]


def check(folder: Path | None) -> dict[str, float]:
    """Compare each peer with our model of the same weights in float32.

    Returns:
        Peer -> the larger of the relative differences of the loss and of the gradient's norm.
    """
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (2, TOKENS + 1), generator=generator)
    ids, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    found = {}
    for peer, family in PEERS.items():
        if peer == "nanoGPT" and folder is None:
            continue
        ours = GPT(shape(family)).train()
        initialize_weights(ours, 0)
        with torch.no_grad():
            for parameter in ours.parameters():  # ones and zeros would hide a mistake
                if parameter.ndim == 1:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        theirs, loss_of = build(peer, folder)
        copy_weights(ours, theirs, peer)
        mine, other = ours(ids, targets) / targets.numel(), loss_of(theirs, ids, targets)
        mine.backward()
        other.backward()
        pairs = [(mine, other), (gradient_norm(ours), gradient_norm(theirs))]
        found[peer] = max(abs(a.item() - b.item()) / abs(b.item()) for a, b in pairs)
    return found


def gradient_norm(model: nn.Module) -> Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


@torch.no_grad()
def copy_weights(ours: GPT, theirs: nn.Module, peer: str) -> None:
    """Copy all of our weights into a peer's model."""
    weights = dict(ours.named_parameters())
    if peer == "litgpt":
        renamed = _litgpt_weights(weights)
    else:
        c = ours.config
        renamed = {
            # nanoGPT has transformers' names, and matrices that aren't transposed.
            huggingface_name(c, name): p.T if is_transposed(c, name) and peer == "HF" else p
            for name, p in weights.items()
        }
    # named_parameters has a tied weight once, under the name of the embedding.
    parameters = dict(theirs.named_parameters())
    assert parameters.keys() == renamed.keys(), parameters.keys() ^ renamed.keys()
    for name, p in parameters.items():
        assert p.shape == renamed[name].shape, name
        p.copy_(renamed[name])
    if peer == "nanoGPT":
        for block in theirs.transformer.h:  # type: ignore[union-attr]
            block.mlp.gelu = nn.GELU(approximate="tanh")  # type: ignore[union-attr]  # GPT-2's own


def _litgpt_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "input_layernorm": "norm_1",
        "self_attn.o_proj": "attn.proj",
        "post_attention_layernorm": "norm_2",
        "mlp.gate_proj": "mlp.fc_1",
        "mlp.up_proj": "mlp.fc_2",
        "mlp.down_proj": "mlp.proj",
    }
    renamed = {
        "lm_head.weight": weights["lm_head.weight"],
        "transformer.wte.weight": weights["embed_tokens.weight"],
        "transformer.ln_f.weight": weights["norm.weight"],
    }
    for layer in range(shape("llama").num_hidden_layers):
        mine, theirs = f"layers.{layer}", f"transformer.h.{layer}"
        parts = [weights[f"{mine}.self_attn.{part}_proj.weight"] for part in "qkv"]
        renamed[f"{theirs}.attn.qkv.weight"] = torch.cat(parts)
        for old, new in names.items():
            renamed[f"{theirs}.{new}.weight"] = weights[f"{mine}.{old}.weight"]
    return renamed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check")
    timed = commands.add_parser("time")
    timed.add_argument("peer", choices=PEERS)
    timed.add_argument("--dtype", choices=("fp32", "bf16", "bf16-true"), default="fp32")
    timed.add_argument("--compile", action="store_true")
    timed.add_argument("--steps", type=int, default=6)
    a = parser.parse_args()
    if a.command == "time":
        seconds = time_steps(a.peer, a.nanogpt, a.dtype, a.compile, a.steps)
        print(json.dumps({"step_seconds": seconds}))
        return
    found = check(a.nanogpt)
    print(json.dumps(found))
    if wrong := [peer for peer, difference in found.items() if difference > TOLERANCE]:
        sys.exit(f"not the architecture of ours: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
