"""What the types of a recipe's settings can't say."""

import math

from minigpt_cli.recipe.schema import DataTokenizer, Recipe


def contradictions(recipe: Recipe) -> list[str]:
    """Settings that are each of the right type but out of range, or don't go together."""
    r, found = recipe, []

    def need(true: bool, problem: str) -> None:
        if not true:
            found.append(problem)

    need(r.base != "", "[lora] base and [model] init_from must not be empty")
    if r.lora is not None and r.model.init_from is not None:
        found.append("[model] init_from and [lora] base both say where the weights come from")
    elif r.lora is None and r.model.init_from is None:
        names = ("family", "hidden_size", "num_hidden_layers", "num_attention_heads")
        missing = [name for name in names if getattr(r.model, name) is None]
        found += [f"[model] {name} is missing" for name in missing]
    if r.lora is not None:
        need(r.lora.rank > 0, f"[lora] rank must be positive, not {r.lora.rank}")
        need(0 < r.lora.alpha < math.inf, f"[lora] alpha must be above 0, not {r.lora.alpha}")
        need(0 <= r.lora.dropout < 1, f"[lora] dropout must lie in [0, 1), not {r.lora.dropout}")
        need(bool(r.lora.target_modules), "[lora] target_modules must not be empty")

    positive = {
        "[train] global_batch_size": r.train.global_batch_size,
        "[train] sequence_length": r.train.sequence_length,
        "[train] steps": r.train.steps,
        "[train] tokens": r.train.tokens,
        "[train] micro_batch_size": r.train.micro_batch_size,
        "[optimizer] lr": r.optimizer.lr,
        "[optimizer] eps": r.optimizer.eps,
        "[optimizer] muon_lr": r.optimizer.muon_lr,
        "[schedule] gamma": r.schedule.gamma,
        "[distributed] shard_size": r.distributed.shard_size,
        "[distributed] timeout_minutes": r.distributed.timeout_minutes,
        "[checkpoint] every_steps": r.checkpoint.every_steps,
        "[checkpoint] keep_last": r.checkpoint.keep_last,
        "[checkpoint] keep_every": r.checkpoint.keep_every,
        "[eval] every_steps": r.eval.every_steps,
        "[eval] windows": r.eval.windows,
        "[eval] patience": r.eval.patience,
        "[eval] prompt_tokens": r.eval.prompt_tokens,
        "[guard] spike_sigma": r.guard.spike_sigma,
        "[guard] rollback_after": r.guard.rollback_after,
        "[log] every_steps": r.log.every_steps,
    }
    for name, value in positive.items():
        need(value is None or value > 0, f"{name} must be positive, not {value}")
        need(value is None or value < math.inf, f"{name} must be finite, not {value}")
    window = r.guard.spike_window
    need(
        8 <= window <= 100_000,
        f"[guard] spike_window must be at least 8 steps, not {window}, and at most 100,000",
    )
    minutes = r.distributed.timeout_minutes
    need(minutes <= 10_000, f"[distributed] timeout_minutes must be at most 10,000, not {minutes}")
    need(r.train.seed >= 0, f"[train] seed must not be negative, not {r.train.seed}")
    need(
        (r.train.steps is None) != (r.train.tokens is None),
        "[train] give the length once, as steps or as tokens",
    )
    micro = r.train.micro_batch_size
    if micro and micro > 0 and r.train.global_batch_size % micro:
        found.append(
            f"[train] global_batch_size {r.train.global_batch_size} is not a multiple of "
            f"micro_batch_size {micro}"
        )
    positions = r.model.max_position_embeddings
    need(
        positions is None or positions >= r.train.sequence_length,
        f"[train] sequence_length {r.train.sequence_length} is longer than [model] "
        f"max_position_embeddings {positions}",
    )
    for name, ratio in {
        "[schedule] min_lr_ratio": r.schedule.min_lr_ratio,
        "[schedule] decay_ratio": r.schedule.decay_ratio,
    }.items():
        need(0 <= ratio <= 1, f"{name} must lie in [0, 1], not {ratio}")
    for name, value in {
        "[optimizer] weight_decay": r.optimizer.weight_decay,
        "[optimizer] clip_norm": r.optimizer.clip_norm,  # 0: no clipping
        "[checkpoint] every_minutes": r.checkpoint.every_minutes,  # 0: never
    }.items():
        need(0 <= value < math.inf, f"{name} must be finite and not negative, not {value}")
    for name, beta in {
        "betas[0]": r.optimizer.betas[0],
        "betas[1]": r.optimizer.betas[1],
        "muon_momentum": r.optimizer.muon_momentum,
    }.items():
        need(0 <= beta < 1, f"[optimizer] {name} must lie in [0, 1), not {beta}")
    need(r.schedule.warmup_steps >= 0, "[schedule] warmup_steps must not be negative")
    need(
        (r.schedule.name == "step") == bool(r.schedule.milestones),
        "[schedule] name = step needs milestones, and other schedules have none",
    )
    need(min(r.schedule.milestones, default=0) >= 0, "[schedule] milestones must not be negative")
    if not found:
        need(
            r.schedule.warmup_steps <= r.total_steps,
            f"[schedule] warmup_steps {r.schedule.warmup_steps} is more than the "
            f"{r.total_steps} steps of the run",
        )
    need(
        r.data.path is not None or r.data.source is not None,
        "[data] path (a token dataset) or [data.source] (text to make one of) is missing",
    )
    if r.data.source is not None:
        source = r.data.source
        need(
            source.kind == "python-stdlib" or bool(source.path),
            f"[data.source] kind {source.kind} needs a path",
        )
        need(0 <= source.val_fraction < 1, "[data.source] val_fraction must lie in [0, 1)")
        if source.format == "instructions":
            need(
                source.kind in ("jsonl", "parquet", "huggingface"),
                f"[data.source] format instructions needs records: kind jsonl, parquet or "
                f"huggingface, not {source.kind}",
            )
            need(
                r.data.tokenizer is None or r.data.tokenizer.train_vocab is None,
                "[data.tokenizer] format instructions needs a tokenizer that is there: give path",
            )
        else:
            need(
                source.chat_template is None,
                "[data.source] chat_template is for format instructions",
            )
        tokenizer = r.data.tokenizer or DataTokenizer()
        brought = r.data.tokenizer is None and r.base is not None  # by what it starts from
        need(
            r.base is None or tokenizer.train_vocab is None,
            "[data.tokenizer] train_vocab: what the weights come from brings its own: leave it out",
        )
        need(
            brought or (tokenizer.path is None) != (tokenizer.train_vocab is None),
            "[data.tokenizer] give path or train_vocab",
        )
    return found
