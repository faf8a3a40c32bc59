"""Settings of runs that are spread over ranks, for tests and for benchmarks/agreement.py."""

COMMON = ["train.steps=50", "schedule.warmup_steps=5", "train.micro_batch_size=2",
          "eval.every_steps=25", "checkpoint.every_steps=1000",
          "optimizer.clip_norm=0.5"]  # fmt: skip
STRATEGIES = ("ddp", "zero2", "fsdp", "hsdp")
# Setting -> overrides, strategies tried on 2 and on 4 ranks, how closely the losses agree. What is
# not tried here, `python -m benchmarks.agreement` does: all strategies with all settings.
# hidden_size 38 and head_dim 6 leave 4 ranks with shards of different sizes, and one with none of
# the norms of queries and keys.
SETTINGS: dict[str, tuple[list[str], tuple[str, ...], tuple[str, ...], float]] = {
    "fp64": (
        ["precision.dtype=fp64", "model.family=gpt2", "model.num_key_value_heads=4",
         "model.dropout=0.1", "train.activation_checkpointing=true"],
        ("ddp", "zero2"), ("fsdp", "hsdp"), 1e-12,
    ),
    # Untied, and two micro-batches on each of 4 ranks.
    "scattered": (
        ["precision.dtype=fp64", "train.micro_batch_size=1"], (), ("fsdp", "hsdp"), 1e-12,
    ),
    "fp32": (["precision.dtype=fp32", "model.family=qwen3"], ("fsdp",), ("ddp", "hsdp"), 1e-5),
    "bf16": (["precision.dtype=bf16", "model.family=qwen3"], (), ("fsdp",), 1e-3),
    "fp16": (["precision.dtype=fp16", "eval.prompts=['You ']"], ("ddp",), (), 5e-3),
    "muon": (
        ["precision.dtype=fp32", "optimizer.name=muon", "model.family=qwen3",
         "model.hidden_size=38", "model.head_dim=6"],
        (), ("fsdp",), 1e-3,
    ),
}  # fmt: skip
