"""Autoregressive decoding with a cache of keys and values.

S: number of samples; B: number of samples that are still in the batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minigpt_cli.core.errors import Diverged, UserError
from minigpt_cli.core.faq import faq
from minigpt_cli.generate.sampling import NOT_FINITE, SamplingOptions, draw_uniforms, next_tokens
from minigpt_cli.model.gpt import GPT
from minigpt_cli.model.kv_cache import KVCache, new_cache
from minigpt_cli.model.precision import autocast

# Not cuDNN, which torch prefers on an H100: it makes a plan for each new length, so for each token.
_GPU_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def generate(
    model: GPT,
    prompt_ids: list[int],
    options: SamplingOptions,
    *,
    max_new_tokens: int,
    num_samples: int = 1,
    seed: int = 0,
    eos_id: int | None = None,
    stop_token_ids: frozenset[int] = frozenset(),
    use_cache: bool = True,
    dtype: torch.dtype | None = None,
    vocab_size: int | None = None,
    finished: list[bool] | None = None,
) -> Iterator[list[int | None]]:
    """Continue a prompt ``num_samples`` times; yield once per token.

    The prompt is computed once; its keys and values are copied to all S rows. When the context is
    full, its last half is kept and computed again, with or without the cache, so that both give
    the same tokens. The model is in evaluation mode only during a step. torch's global generators
    are not used.

    Args:
        prompt_ids: the prompt; only its last ``max_position_embeddings`` tokens are used. An empty
            prompt starts from ``eos_id``, as documents do in training.
        seed: sample i depends only on (seed, i).
        eos_id: ends a sample; yielded as its last token.
        stop_token_ids: further tokens that end a sample, e.g. the end of a turn.
        dtype: of autocast and the cache; None: the dtype of the weights.
        vocab_size: ids from here on are never chosen (padded embeddings).
        finished: S flags; the caller may set one between steps to end that sample.

    Yields:
        S entries: the new token of each sample; None if the sample ended earlier.

    Raises:
        UserError: an empty prompt without ``eos_id``, a token outside the vocabulary, or a count
            below 1. Raised by the call, not by the first step.
        Diverged: logits are not finite.
    """
    if max_new_tokens < 1 or num_samples < 1:
        raise UserError(
            f"max_new_tokens and num_samples must be 1 or more, not {max_new_tokens} and "
            f"{num_samples}"
        )
    if not prompt_ids:
        if eos_id is None:
            raise UserError("an empty prompt needs a tokenizer with an end-of-text token")
        prompt_ids = [eos_id]
    _check_ids(model, prompt_ids)
    finished = [False] * num_samples if finished is None else finished
    assert len(finished) == num_samples
    uniforms = draw_uniforms(seed, num_samples, max_new_tokens)
    if dtype is None:
        dtype = model.embed_tokens.weight.dtype
    return _decode(
        model,
        [prompt_ids],
        options,
        uniforms,
        stop_token_ids | {eos_id},
        use_cache,
        dtype,
        vocab_size,
        finished,
    )


def generate_each(
    model: GPT,
    prompts: list[list[int]],
    options: SamplingOptions,
    *,
    max_new_tokens: int,
    finished: list[bool],
    seed: int = 0,
    stop_token_ids: frozenset[int] = frozenset(),
    dtype: torch.dtype | None = None,
    vocab_size: int | None = None,
) -> Iterator[list[int | None]]:
    """Continue S prompts once each, as one batch; yield once per token.

    A prompt's continuation is what ``generate`` makes of it alone, up to rounding. The other
    arguments are those of ``generate``.

    Args:
        prompts: at least one token each; the longest and ``max_new_tokens`` fit into the context.
        finished: S flags; the caller may set one between steps to end that prompt's text.

    Yields:
        S entries: the new token of each prompt; None if its text ended earlier.

    Raises:
        UserError: a token outside the vocabulary. Raised by the call, not by the first step.
        Diverged: logits are not finite.
    """
    assert all(prompts)
    assert len(finished) == len(prompts)
    room = model.config.max_position_embeddings - max_new_tokens
    assert max(map(len, prompts)) <= room, (max(map(len, prompts)), room)
    for prompt_ids in prompts:
        _check_ids(model, prompt_ids)
    return _decode(
        model,
        prompts,
        options,
        draw_uniforms(seed, len(prompts), max_new_tokens),
        frozenset(stop_token_ids),
        True,
        model.embed_tokens.weight.dtype if dtype is None else dtype,
        vocab_size,
        finished,
    )


def _check_ids(model: GPT, prompt_ids: list[int]) -> None:
    known = model.config.vocab_size
    unknown = next((token for token in prompt_ids if not 0 <= token < known), None)
    if unknown is not None:
        raise UserError(
            f"token {unknown} of the prompt is outside the model's vocabulary of {known}: "
            "is this the tokenizer it was trained with?"
        )


def _decode(
    model: GPT,
    prompts: list[list[int]],
    options: SamplingOptions,
    uniforms: Tensor,
    stop_token_ids: frozenset[int | None],
    use_cache: bool,
    dtype: torch.dtype,
    vocab_size: int | None,
    finished: list[bool],
) -> Iterator[list[int | None]]:
    """The loop behind ``generate``.

    Args:
        prompts: one for all S samples, or one for each.
        uniforms: (S, max_new_tokens), on the CPU.
    """
    samples, max_new_tokens = uniforms.shape
    context = model.config.max_position_embeddings
    device = model.embed_tokens.weight.device
    uniforms = uniforms.to(device, torch.float32 if device.type == "mps" else torch.float64)
    window, padding = _padded([prompt[-context:] for prompt in prompts], device)  # (B, T), (B,)
    seen = None
    if options.repetition_penalty != 1:
        seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=device)
        for row, prompt in enumerate(prompts):
            seen[row, torch.tensor(prompt, device=device)] = True
    cache: KVCache | None = None
    rows = list(range(samples))  # the sample of each row of the batch

    for step in range(max_new_tokens):
        with _evaluating(model, dtype):
            if window.shape[1] > context:
                assert padding is None
                window, cache = window[:, -max(1, context // 2) :], None
            if use_cache and cache is None:
                capacity = min(context, window.shape[1] + max_new_tokens - step)
                cache = new_cache(model.config, len(window), capacity, device, dtype)
            new_tokens = window if cache is None or not cache.length else window[:, -1:]
            logits = model(new_tokens, cache=cache, padding=padding, logits_to_keep=1)
            if step == 0 and samples > len(prompts):
                every = torch.zeros(samples, dtype=torch.int64, device=device)
                logits, window, seen, cache = logits[every], *_take(every, window, seen, cache)
            logits = logits[:, -1, :vocab_size]
            tokens = next_tokens(
                logits,
                options,
                uniforms[:, step],
                None if seen is None else seen[:, :vocab_size],
            )
            window = torch.cat((window, tokens[:, None]), dim=1)
            chosen = tokens.tolist()  # the only synchronisation of a step
            if NOT_FINITE in chosen:
                raise Diverged(
                    "the model's logits are not finite: its weights diverged in training, "
                    f"take an earlier checkpoint {faq('loss-is-nan')}"
                )
            if seen is not None:
                seen.scatter_(1, tokens[:, None], True)

        new: list[int | None] = [None] * samples
        for sample, token in zip(rows, chosen, strict=True):
            if not finished[sample]:
                new[sample] = token
                finished[sample] = token in stop_token_ids
        yield new

        alive = [row for row, sample in enumerate(rows) if not finished[sample]]
        if not alive:
            return
        if len(alive) <= len(rows) // 2:  # only when half has ended: each time copies the cache
            keep = torch.tensor(alive, device=device)
            with torch.inference_mode():
                window, seen, cache = _take(keep, window, seen, cache)
                uniforms = uniforms[keep]
                padding = None if padding is None else padding[keep]
            rows = [rows[row] for row in alive]


def _padded(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return the prompts as rows of one length, and the padding before each if there is any."""
    length = max(map(len, prompts))
    missing = [length - len(prompt) for prompt in prompts]
    rows = [[0] * before + prompt for before, prompt in zip(missing, prompts, strict=True)]
    padding = torch.tensor(missing, device=device) if any(missing) else None
    return torch.tensor(rows, device=device), padding


def _take(
    keep: Tensor, window: Tensor, seen: Tensor | None, cache: KVCache | None
) -> tuple[Tensor, Tensor | None, KVCache | None]:
    """Select the rows ``keep`` (int64) of all per-row state."""
    if cache is not None:
        cache = KVCache(cache.keys[:, keep], cache.values[:, keep], cache.length)
    return window[keep], None if seen is None else seen[keep], cache


@contextmanager
def _evaluating(model: GPT, dtype: torch.dtype) -> Iterator[None]:
    """Enter evaluation mode, without autograd, with autocast to dtype, for one step."""
    training = model.training
    weight = model.embed_tokens.weight
    mixed = nullcontext() if dtype == weight.dtype else autocast(dtype, weight.device)
    attention = sdpa_kernel(_GPU_ATTENTION) if weight.device.type == "cuda" else nullcontext()
    if training:
        model.eval()
    try:
        with torch.inference_mode(), mixed, attention:
            yield
    finally:
        if training:
            model.train()
