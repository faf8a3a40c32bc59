"""``minigpt sample``."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from minigpt_cli.commands.options import Adapters, Debug, Device, Json, Version, option
from minigpt_cli.core.console import print_json, printable, warn
from minigpt_cli.core.errors import Stopped, UserError
from minigpt_cli.core.reading import MAX_BYTES, read_text
from minigpt_cli.core.signals import nothing_is_saved

if TYPE_CHECKING:
    from minigpt_cli.generate.text import Completion, TextChunk
    from minigpt_cli.huggingface.adapter import LoadedAdapter
    from minigpt_cli.huggingface.load import TrainedModel
    from minigpt_cli.model.gpt import GPT

EXAMPLE = "minigpt sample runs/tiny --prompt 'def main' --temperature 0.7 --num-samples 3"

PROMPT, COMPLETIONS, SAMPLING = "Prompt", "Completions", "Sampling"

OptionalModel = Annotated[
    Path | None,
    typer.Argument(
        metavar="MODEL",
        help="A run, a checkpoint, a Hugging Face directory or Hub id, or an adapter; default: the "
        "newest run under runs/.",
    ),
]
Prompt = Annotated[
    str | None,
    option("--prompt", "TEXT", "The text to continue; -: what standard input holds.", PROMPT),
]
PromptFile = Annotated[
    Path | None, option("--prompt-file", "FILE", "A file with the text to continue.", PROMPT)
]
Chat = Annotated[
    bool,
    option(
        "--chat", "", "Send the prompt as a user's message, with the model's chat template.", PROMPT
    ),
]
NumSamples = Annotated[
    int,
    option(
        "--num-samples", "N", "Number of completions, computed as one batch.", COMPLETIONS, min=1
    ),
]
MaxNewTokens = Annotated[
    int, option("--max-new-tokens", "N", "Tokens per completion, at most.", COMPLETIONS, min=1)
]
Stop = Annotated[
    list[str] | None,
    option("--stop", "TEXT", "End a completion before this text; may be repeated.", COMPLETIONS),
]
Temperature = Annotated[
    float, option("--temperature", "X", "Higher is more random; 0 is greedy.", SAMPLING)
]
TopK = Annotated[
    int | None, option("--top-k", "K", "Sample from the K most likely tokens.", SAMPLING)
]
TopP = Annotated[
    float | None,
    option("--top-p", "P", "Sample from the fewest tokens whose probabilities sum to P.", SAMPLING),
]
MinP = Annotated[
    float | None,
    option(
        "--min-p",
        "P",
        "Sample from tokens at least P times as likely as the most likely one.",
        SAMPLING,
    ),
]
RepetitionPenalty = Annotated[
    float, option("--repetition-penalty", "X", "Above 1: repeat less.", SAMPLING)
]
Greedy = Annotated[bool, option("--greedy", "", "Always take the most likely token.", SAMPLING)]
Seed = Annotated[int, option("--seed", "N", "The same seed gives the same text.", SAMPLING)]
WeightsDtype = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    option(
        "--dtype",
        None,
        "Number format of the weights; auto: bf16 on a GPU and on a CPU that has it, else fp32.",
        "Model",
    ),
]


def sample_command(
    model: OptionalModel = None,
    adapter: Adapters = None,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    chat: Chat = False,
    max_new_tokens: MaxNewTokens = 200,
    num_samples: NumSamples = 1,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = 1.0,
    greedy: Greedy = False,
    stop: Stop = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: WeightsDtype = "auto",
    as_json: Json = False,
    version: Version = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt, printed as it is generated.

    With several --adapter each one continues the prompt in turn.
    """
    nothing_is_saved()
    # Large pages for tensors on a CPU, before torch makes the first one (benchmarks/LOG.md).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    prompt = _read_prompt(prompt, prompt_file)
    if chat:
        from minigpt_cli.data.untrusted import start_early

        start_early()
    from minigpt_cli.commands.loading import each_adapter, load_and_report
    from minigpt_cli.data.tokenizer import eos_id
    from minigpt_cli.generate.packed import pack_weights
    from minigpt_cli.generate.sampling import SamplingOptions
    from minigpt_cli.generate.text import join_chunks, stream_text
    from minigpt_cli.huggingface.base_model import stop_token_ids
    from minigpt_cli.huggingface.load import newest_run

    temperature = 0.0 if greedy else temperature
    sampling = SamplingOptions(temperature, top_k, top_p, min_p, repetition_penalty)
    trained = load_and_report(model or newest_run(), adapter, device)
    _set_dtype(trained.model, dtype)
    if len(trained.adapters) < 2:  # a second adapter may need the weights of other layers
        pack_weights(trained.model)
    prompt_ids = _chat_ids(trained, prompt) if chat else _text_ids(trained, prompt)
    context = trained.model.config.max_position_embeddings
    if len(prompt_ids) > context:
        warn(
            f"the prompt has {len(prompt_ids):,} tokens; the model sees only the last {context:,}, "
            "its context"
        )
    results = []
    for each in each_adapter(trained):
        chunks = stream_text(
            trained.model,
            trained.tokenizer,
            prompt_ids,
            sampling,
            max_new_tokens=max_new_tokens,
            num_samples=num_samples,
            seed=seed,
            eos_id=eos_id(trained.tokenizer),
            stop_token_ids=stop_token_ids(trained.base, trained.tokenizer),
            stop=stop or [],
        )
        if not as_json:
            chunks = _print_live(chunks, num_samples, "" if chat else prompt)
        seen = min(len(prompt_ids), context)
        results.append({"prompt": prompt} | _result(join_chunks(chunks), trained, each, seen))
    if as_json:
        print_json(results[0] if len(results) == 1 else {"prompt": prompt, "adapters": results})


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    """Return the prompt as it was given, read from a file or from standard input."""
    if prompt is not None and file is not None:
        raise UserError("--prompt and --prompt-file can't be combined: give one of them")
    if file is not None:
        return read_text(file)
    try:
        if prompt == "-":
            content = sys.stdin.buffer.read(MAX_BYTES + 1) if sys.stdin else b""
            if len(content) > MAX_BYTES:
                raise UserError(f"--prompt -: standard input has more than {MAX_BYTES:,} bytes")
            return content.decode()
        (prompt or "").encode()
    except (UnicodeEncodeError, UnicodeDecodeError):  # the shell passed bytes that are no UTF-8
        raise UserError("--prompt: is not UTF-8 text") from None
    return prompt or ""


def _result(
    completions: list["Completion"],
    trained: "TrainedModel",
    adapter: "LoadedAdapter | None",
    seen: int,
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "completions": [completion.text for completion in completions],
        "finish_reasons": [completion.finish_reason for completion in completions],
        "checkpoint": str(trained.checkpoint_of(adapter)),
        "prompt_tokens_seen": seen,
    }
    return result if adapter is None else result | {"adapter": adapter.name}


def _set_dtype(model: "GPT", dtype: str) -> None:
    import torch

    from minigpt_cli.model.precision import DTYPES, cpu_has_bf16

    weight = model.embed_tokens.weight
    if dtype != "auto":
        model.to(DTYPES[dtype])
    elif weight.device.type == "cuda" or (weight.dtype == torch.float32 and cpu_has_bf16()):
        model.to(torch.bfloat16)  # a model that was trained in float64 stays so on a CPU


def _text_ids(trained: "TrainedModel", prompt: str) -> list[int]:
    """Encode a prompt. Only models from elsewhere expect the special tokens that their tokenizer
    adds, such as Llama's begin-of-text: minigpt trains without them."""
    from minigpt_cli.huggingface.adapter import trained_by_minigpt

    special = not trained_by_minigpt(
        trained.base, trained.adapters[0] if trained.adapters else None
    )
    return list(trained.tokenizer.encode(prompt, add_special_tokens=special).ids)


def _chat_ids(trained: "TrainedModel", prompt: str) -> list[int]:
    """Encode the prompt as a user's message, up to where the assistant's answer begins."""
    from minigpt_cli.data.chat import render
    from minigpt_cli.data.tokenizer import recognising_special_tokens
    from minigpt_cli.huggingface.auxiliary_files import chat_template

    base = trained.base
    template, variables = chat_template(base.tokenizer, base.auxiliary_files)
    if template is None:
        raise UserError(f"{base.name}: has no chat template; leave out --chat")
    messages = [{"role": "user", "content": prompt}]
    text = render(template, messages, add_generation_prompt=True, variables=variables)
    tokenizer = recognising_special_tokens(trained.tokenizer)  # the template wrote them
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def _print_live(
    chunks: Iterator["TextChunk"], num_samples: int, prompt: str
) -> Iterator["TextChunk"]:
    """Pass chunks on and print them: the first sample as it comes, each further sample once all
    before it are complete."""
    waiting: list[list[str]] = [[] for _ in range(num_samples)]
    ended: set[int] = set()
    current = 0
    is_terminal = sys.stdout is not None and sys.stdout.isatty()

    def show(text: str) -> None:
        print(printable(text, keep="\n") if is_terminal else text, end="", flush=True)

    try:
        show(prompt)
        for chunk in chunks:
            yield chunk
            waiting[chunk.sample].append(chunk.text)
            if chunk.finish_reason is not None:
                ended.add(chunk.sample)
            while current < num_samples:
                show("".join(waiting[current]))
                waiting[current] = []
                if current not in ended:
                    break
                current += 1
                show("\n")
                if current < num_samples:
                    show(f"\n--- {current + 1} ---\n{prompt}")
    except Stopped:
        show("\n")  # what standard error says next begins a line
        raise
