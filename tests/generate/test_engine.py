"""Decoding: the cache, the context's end, batches of samples, and transformers as the oracle."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minigpt_cli.core.errors import Diverged, UserError
from minigpt_cli.generate.engine import generate, generate_each
from minigpt_cli.generate.sampling import SamplingOptions
from minigpt_cli.model.config import model_config
from minigpt_cli.model.gpt import GPT, initialize_weights
from minigpt_cli.model.hf_names import huggingface_config
from tests.helpers.hf_layout import to_huggingface

FAMILIES = ["gpt2", "llama", "qwen3"]
GREEDY = SamplingOptions(temperature=0)
VARIED = SamplingOptions(1.5, top_k=30, top_p=0.95, min_p=0.01, repetition_penalty=1.1)
PROMPT = [3, 1, 4, 1, 5]


def small_model(family, context=16, seed=0):
    """Weights so large that greedy text does not repeat one token, in float64 so that no rounding
    can tip the balance between two tokens."""
    config = model_config(
        family=family,
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=None if family == "gpt2" else 2,
        max_position_embeddings=context,
        initializer_range=0.4,
        tie_word_embeddings=False,
    )
    model = GPT(config)
    initialize_weights(model, seed)
    return model.double()


def texts(model, options=GREEDY, prompt=PROMPT, **settings):
    """Each sample's tokens."""
    settings = {"max_new_tokens": 60, **settings}
    steps = list(generate(model, prompt, options, **settings))
    return [[t for t in sample if t is not None] for sample in zip(*steps, strict=True)]


@pytest.mark.parametrize("options", [GREEDY, VARIED])
@pytest.mark.parametrize("family", FAMILIES)
def test_cache_changes_nothing(family, options):
    model = small_model(family)
    for prompt in (PROMPT, list(range(16)), list(range(40))):  # short, full, too long
        settings = {"prompt": prompt, "num_samples": 3, "seed": 7}
        cached = texts(model, options, use_cache=True, **settings)
        assert cached == texts(model, options, use_cache=False, **settings)
        assert all(len(text) == 60 for text in cached)
        assert all(len(set(text)) > 5 for text in cached)


def test_windows_when_the_context_is_full():
    """What the model sees, from the definition: up to 16 tokens, then the last 8 and on."""
    model = small_model("llama")
    tokens = list(PROMPT)
    window = list(PROMPT)
    with torch.inference_mode():
        for _ in range(40):
            if len(window) > 16:
                window = window[-8:]
            token = model(torch.tensor([window]))[0, -1].argmax().item()
            tokens.append(token)
            window.append(token)
    assert texts(model, max_new_tokens=40)[0] == tokens[len(PROMPT) :]
    assert texts(model, prompt=list(range(40))) == texts(model, prompt=list(range(24, 40)))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(family):
    model = small_model(family, context=64)
    config = AutoConfig.for_model(**huggingface_config(model.config))
    theirs = AutoModelForCausalLM.from_config(config).double().eval()
    weights = to_huggingface(model.config, dict(model.named_parameters()))
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not missing
    assert not unexpected
    for options in (GREEDY, SamplingOptions(0, repetition_penalty=1.3)):
        expected = theirs.generate(
            torch.tensor([PROMPT]),
            attention_mask=torch.ones(1, len(PROMPT), dtype=torch.int64),
            max_new_tokens=50,
            do_sample=False,
            repetition_penalty=options.repetition_penalty,
            pad_token_id=0,
        )[0, len(PROMPT) :].tolist()
        assert len(set(expected)) > 5
        assert texts(model, options, max_new_tokens=50)[0] == expected


def test_sample_by_seed_and_number():
    model = small_model("qwen3")
    alone = texts(model, VARIED, seed=1)
    five = texts(model, VARIED, seed=1, num_samples=5)
    assert five[:1] == alone
    assert five == texts(model, VARIED, seed=1, num_samples=5)
    assert len({tuple(text) for text in five}) == 5
    assert texts(model, VARIED, seed=2) != alone


@pytest.mark.parametrize("options", [GREEDY, SamplingOptions(0, repetition_penalty=1.3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_several_lengths_in_one_batch(family, options):
    """Each is continued as it is alone, also when others have ended and the batch is smaller."""
    model = small_model(family, context=40)
    prompts = [[7], PROMPT, [*PROMPT, 9, 2, 6], list(range(16)), PROMPT]
    alone = [texts(model, options, prompt, max_new_tokens=24)[0] for prompt in prompts]
    assert len({tuple(text) for text in alone}) == 4
    eos = alone[0][5]
    cut = [text[: text.index(eos) + 1] if eos in text else text for text in alone]
    for stop, expected in ((frozenset(), alone), (frozenset([eos]), cut)):
        steps = list(
            generate_each(
                model, prompts, options, max_new_tokens=24, stop_token_ids=stop,
                finished=[False] * len(prompts),
            )
        )  # fmt: skip
        together = zip(*steps, strict=True)
        assert [[t for t in text if t is not None] for text in together] == expected
    assert cut != alone


def test_an_unknown_token_in_one_of_several_prompts():
    with pytest.raises(UserError, match="token 61 of the prompt"):
        generate_each(
            small_model("llama"), [[1], [61]], GREEDY, max_new_tokens=1, finished=[False] * 2
        )


def test_samples_end_at_eos():
    model = small_model("gpt2")
    free = texts(model, VARIED, num_samples=8, max_new_tokens=40)
    eos = max(range(61), key=lambda token: sum(token in text for text in free))
    cut = [text[: text.index(eos) + 1] if eos in text else text for text in free]
    assert len({len(text) for text in cut}) > 3  # several end, at different steps
    for use_cache in (True, False):
        settings = {"num_samples": 8, "max_new_tokens": 40, "eos_id": eos, "use_cache": use_cache}
        assert texts(model, VARIED, **settings) == cut
    steps = list(generate(model, PROMPT, VARIED, num_samples=8, max_new_tokens=40, eos_id=eos))
    assert len(steps) == max(len(text) for text in cut)  # no step when all have ended
    for sample, text in enumerate(cut):
        assert all(step[sample] is None for step in steps[len(text) :])


def test_the_caller_can_end_a_sample():
    model = small_model("gpt2")
    free = texts(model, VARIED, num_samples=4, max_new_tokens=20)
    finished = [False] * 4
    got = [[] for _ in range(4)]
    for step, tokens in enumerate(
        generate(model, PROMPT, VARIED, num_samples=4, max_new_tokens=20, finished=finished)
    ):
        for sample, token in enumerate(tokens):
            if token is not None:
                got[sample].append(token)
        finished[step % 4] = finished[step % 4] or step in (4, 5, 7)
    assert got == [free[0][:5], free[1][:6], free[2], free[3][:8]]


def test_the_batch_shrinks_as_samples_end():
    model = small_model("gpt2", context=64)
    batches = []
    model.register_forward_hook(lambda module, args, output: batches.append(tuple(args[0].shape)))
    finished = [False] * 8
    for step, _ in enumerate(
        generate(model, PROMPT, GREEDY, num_samples=8, max_new_tokens=9, finished=finished)
    ):
        finished[step % 8] = True
    assert batches[0] == (1, len(PROMPT))  # the prompt is computed once, for all of them
    assert [rows for rows, _ in batches[1:]] == [8, 8, 8, 4, 4, 2, 1]
    assert {tokens for _, tokens in batches[1:]} == {1}


def test_an_empty_prompt_starts_from_eos():
    model = small_model("gpt2")
    assert texts(model, prompt=[], eos_id=9) == texts(model, prompt=[9], eos_id=9)
    with pytest.raises(UserError, match="empty prompt"):
        generate(model, [], GREEDY, max_new_tokens=1)


def test_padding_ids_are_never_chosen():
    model = small_model("gpt2")
    drawn = texts(model, VARIED, num_samples=4, vocab_size=20)
    assert max(max(text) for text in drawn) == 19
    assert max(max(text) for text in texts(model, VARIED, num_samples=4)) > 19


def test_a_context_of_one_token_works():
    assert len(texts(small_model("llama", context=1), max_new_tokens=5)[0]) == 5


def test_generation_changes_nothing():
    model = small_model("llama")
    tokens = torch.tensor([PROMPT])
    before = torch.get_rng_state()
    for _ in generate(model, PROMPT, VARIED, max_new_tokens=20, num_samples=2):
        assert model.training
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_autocast_enabled("cpu")
    assert torch.equal(before, torch.get_rng_state())
    model(tokens, tokens).backward()
    model.eval()
    next(generate(model, PROMPT, VARIED, max_new_tokens=20))
    assert not model.training


def test_dropout_is_off():
    config = model_config(
        family="gpt2",
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        dropout=0.5,
        initializer_range=0.4,
    )
    model = GPT(config)
    initialize_weights(model, 0)
    assert texts(model) == texts(model)


@pytest.mark.filterwarnings("error")  # a user would see them at every run
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_autocast_stays_close(family):
    """A CPU keeps keys and values in float32: attention is faster with it there."""
    model = small_model(family, context=64).float()
    calls = []
    model.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs["cache"].keys.dtype, output)),
        with_kwargs=True,
    )
    new = texts(model, max_new_tokens=3, dtype=torch.bfloat16)[0]
    assert [dtype for dtype, _ in calls] == [torch.float32] * 3
    rounded = calls[-1][1].flatten().float()
    with torch.no_grad():
        exact = GPT.forward(model, torch.tensor([PROMPT + new[:2]]))[0, -1]
    error = (rounded - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.1


def test_a_diverged_model_is_named_as_such():
    model = small_model("gpt2")
    with torch.no_grad():
        model.norm.weight[3] = float("nan")
    with pytest.raises(Diverged, match="earlier checkpoint"):
        next(generate(model, PROMPT, GREEDY, max_new_tokens=5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"num_samples": 0}, "num_samples"),
        ({"prompt_ids": [1, 61]}, "token 61 .* vocabulary of 61"),
        ({"prompt_ids": [-1]}, "token -1"),
    ],
)
def test_bad_requests(settings, message):
    arguments = {"prompt_ids": PROMPT, "max_new_tokens": 5, **settings}
    with pytest.raises(UserError, match=message):
        generate(small_model("gpt2"), options=GREEDY, **arguments)
