"""Our model behind the interface of lm-evaluation-harness. Needs the package lm-eval.

The conventions are those of the harness's own backend for transformers, so that results agree.
"""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from minigpt_cli.core.console import warn
from minigpt_cli.core.errors import UserError
from minigpt_cli.data.tokenizer import recognising_special_tokens, vocabulary_size
from minigpt_cli.evaluate.continuations import Track, score_continuations
from minigpt_cli.generate.engine import generate_each
from minigpt_cli.generate.sampling import SamplingOptions
from minigpt_cli.generate.text import detokenizer
from minigpt_cli.model.gpt import GPT

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Messages = list[dict[str, str]]

_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")
_KNOWN = {*_SAMPLING, "until", "max_gen_toks", "do_sample", "temperature"}


class HarnessModel(TemplateLM):
    """Answers the harness's requests with a model of ours."""

    def __init__(
        self,
        model: GPT,
        tokenizer: "Tokenizer",
        *,
        start_id: int,
        stop_ids: frozenset[int],
        batch_size: int,
        dtype: torch.dtype,
        track: Track,
        render_chat: Callable[[Messages], str] | None = None,
    ) -> None:
        """Wrap a model in evaluation mode.

        Args:
            model: The model, with its adapter if it has one.
            tokenizer: The model's.
            start_id: The token before a text without context.
            stop_ids: The tokens that end a generated text.
            batch_size: Sequences per batch.
            dtype: Of matrix products and of the cache.
            track: See ``score_continuations``.
            render_chat: Renders a conversation up to the assistant's answer.
        """
        super().__init__()
        self.model = model
        self.tokens = recognising_special_tokens(tokenizer)
        self.start_id = start_id
        self.start_text = tokenizer.decode([start_id], skip_special_tokens=False)
        self.stop_ids = stop_ids
        self.batch_size = batch_size
        self.dtype = dtype
        self.track = track
        self.render_chat = render_chat
        self.context = model.config.max_position_embeddings
        self._warned: set[str] = set()

    @property
    def eot_token_id(self) -> int:
        return min(self.stop_ids)

    @property
    def prefix_token_id(self) -> int:
        return self.start_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Encode a text, with the tokens that the tokenizer puts before one, but never twice."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.start_text)
        return list(self.tokens.encode(string, add_special_tokens=add_special_tokens).ids)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return [(each.log_likelihood, each.is_greedy) for each in self._score(pairs)]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Sum the log-likelihoods of whole texts; long ones in windows of the model's context."""
        windows, owners = [], []
        for index, request in enumerate(requests):
            for window in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.start_id, self.context, 1
            ):
                windows.append(make_disjoint_window(window))
                owners.append(index)
        sums = [0.0] * len(requests)
        for index, each in zip(owners, self._score(windows), strict=True):
            sums[index] += each.log_likelihood
        return sums

    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> Any:
        return score_continuations(
            self.model, pairs, dtype=self.dtype, batch_size=self.batch_size, track=self.track
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Continue each context until a stop string, the end of the text, or the most tokens."""
        groups: dict[str, list[tuple[int, list[int]]]] = {}
        for index, request in enumerate(requests):
            context, settings = request.args
            ids = self.tok_encode(context) or [self.start_id]
            groups.setdefault(json.dumps(settings, sort_keys=True), []).append((index, ids))
        batches = []
        for text, members in groups.items():
            settings = self._settings(json.loads(text))
            members.sort(key=lambda member: (-len(member[1]), member[0]))
            for start in range(0, len(members), self.batch_size):
                batches.append((members[start : start + self.batch_size], settings))
        texts = [""] * len(requests)
        for number, (members, settings) in enumerate(self.track(batches, "generating")):
            found = self._generate([ids for _, ids in members], number, **settings)
            for (index, _), text in zip(members, found, strict=True):
                texts[index] = text
        return texts

    def _settings(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of ``_generate`` for a task's generation_kwargs."""
        known = dict(normalize_gen_kwargs(given, 256))
        for name in sorted(known.keys() - _KNOWN):
            self._warn_once(f"generation_kwargs: {name} is not supported, and ignored")
        new_tokens = known["max_gen_toks"]
        if new_tokens >= self.context:
            new_tokens = self.context // 2
            self._warn_once(
                f"a task asks for {known['max_gen_toks']:,} new tokens, and the model's context is "
                f"{self.context:,}: only {new_tokens:,} are generated"
            )
        temperature = float(known.get("temperature", 1.0)) if known["do_sample"] else 0.0
        chosen = {name: known[name] for name in _SAMPLING if known.get(name) is not None}
        return {
            "options": SamplingOptions(temperature, **chosen),
            "max_new_tokens": new_tokens,
            "stop": [text for text in known["until"] if text],
        }

    def _generate(
        self,
        prompts: list[list[int]],
        seed: int,
        options: SamplingOptions,
        max_new_tokens: int,
        stop: list[str],
    ) -> list[str]:
        """Continue prompts as one batch; return the texts up to their stop strings."""
        room = self.context - max_new_tokens
        if (longest := max(map(len, prompts))) > room:
            self._warn_once(
                f"prompts have up to {longest:,} tokens; with {max_new_tokens:,} new ones the "
                f"model's context of {self.context:,} holds the last {room:,} of them"
            )
        finished = [False] * len(prompts)
        decoders = [detokenizer(self.tokens, []) for _ in prompts]
        texts = [""] * len(prompts)
        ids = {self.tokens.token_to_id(text) for text in stop}
        ends = frozenset(each for each in decoders[0].special if each in ids)
        steps = generate_each(
            self.model,
            [ids[-room:] for ids in prompts],
            options,
            max_new_tokens=max_new_tokens,
            seed=seed,
            stop_token_ids=self.stop_ids | ends,
            dtype=self.dtype,
            vocab_size=vocabulary_size(self.tokens),
            finished=finished,
        )
        for tokens in steps:
            for row, token in enumerate(tokens):
                if token is not None:
                    texts[row] += decoders[row].push(token)
                    if any(text in texts[row] for text in stop):
                        finished[row] = True
        whole = [text + decoder.flush() for text, decoder in zip(texts, decoders, strict=True)]
        return [postprocess_generated_text(text, stop, None) for text in whole]

    def apply_chat_template(
        self, chat_history: Messages, add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation up to the assistant's answer."""
        assert self.render_chat is not None
        if not add_generation_prompt:
            raise UserError("a task begins the assistant's answer itself: leave out --chat")
        return self.render_chat(chat_history)

    @property
    def tokenizer_name(self) -> str:
        return "minigpt"

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warn(message)
