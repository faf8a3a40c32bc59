"""Render conversations with a chat template, and find the parts that the loss counts.

A template is a program that comes with a model's tokenizer. It runs in a child process with limits
(`untrusted.py`).
"""

from datetime import datetime
from pathlib import Path
from typing import Any

from minigpt_cli.core.errors import UserError
from minigpt_cli.core.reading import read_json, read_text
from minigpt_cli.data import untrusted
from minigpt_cli.data.templates import Messages
from minigpt_cli.data.tokenizer import eos_id, load_tokenizer

# A chat template (None: there is none), and the special tokens that it may name.
ModelTemplate = tuple[str | None, dict[str, str]]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_WHAT = "the chat template"  # in messages

# File names in a Hugging Face directory.
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"


def template_and_tokens(tokenizer: Path, folder: Path | None = None) -> ModelTemplate:
    """Return a model's chat template and special tokens.

    Args:
        tokenizer: the tokenizer's file or directory. Its end-of-text token is the ``eos_token``,
            unless the folder names another.
        folder: a Hugging Face directory; None: the one that holds the tokenizer.

    Raises:
        UserError: a file can't be read, or the tokenizer has no end-of-text token.
    """
    if folder is None:
        folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    loaded = load_tokenizer(tokenizer)
    end = {"eos_token": str(loaded.id_to_token(eos_id(loaded)))}
    return tokenizer_template(folder), end | special_tokens(folder)


def tokenizer_template(folder: Path) -> str | None:
    """Return the chat template of the tokenizer in a Hugging Face directory.

    ``chat_template.jinja`` takes precedence over ``tokenizer_config.json``. If there are several
    templates, the one named ``default`` is used.

    Returns:
        The template, or None if there is none.

    Raises:
        UserError: a file can't be read.
    """
    if (folder / CHAT_TEMPLATE).is_file():
        return read_text(folder / CHAT_TEMPLATE)
    found = _object(folder / TOKENIZER_CONFIG).get("chat_template")
    if isinstance(found, list):
        named = [entry for entry in found if isinstance(entry, dict)]
        found = next((e.get("template") for e in named if e.get("name") == "default"), None)
    if found is not None and not isinstance(found, str):
        raise UserError(
            f"{folder / TOKENIZER_CONFIG}: chat_template is not text but {type(found).__name__}: "
            f"put the template into {CHAT_TEMPLATE}"
        )
    return found


def special_tokens(folder: Path) -> dict[str, str]:
    """Return the special tokens of a Hugging Face directory as the variables that templates use.

    ``special_tokens_map.json`` is read only if ``tokenizer_config.json`` doesn't list its added
    tokens, as in older models. transformers does the same.

    Returns:
        ``{"bos_token": "<s>", ...}``, empty if the directory names none.

    Raises:
        UserError: a file can't be read.
    """
    entries = _object(folder / TOKENIZER_CONFIG)
    if "added_tokens_decoder" not in entries:
        entries = entries | _object(folder / SPECIAL_TOKENS_MAP)
    tokens = {}
    for name, value in entries.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def check_template(template: str) -> None:
    """Check that a template can be parsed.

    Raises:
        UserError: it can't.
    """
    untrusted.ask_child(_WHAT, "check_template", template=template)


def render(
    template: str,
    messages: Messages,
    *,
    add_generation_prompt: bool = False,
    variables: dict[str, str] | None = None,
    now: datetime | None = None,
) -> str:
    """Render a conversation as transformers' ``apply_chat_template(tokenize=False)`` does.

    Args:
        template: the Jinja program.
        messages: each with ``role`` and ``content``.
        add_generation_prompt: end with the beginning of an assistant's message.
        variables: what the template may use besides the messages, see `special_tokens`.
        now: the time for ``strftime_now``; None: the current time.

    Returns:
        The text.

    Raises:
        Refusal: the template refuses these messages.
        UserError: the template can't be parsed, or takes too much time or memory.
    """
    text: str = untrusted.ask_child(
        _WHAT,
        "render",
        template=template,
        messages=messages,
        add_generation_prompt=add_generation_prompt,
        variables=variables or {},
        now=(now or datetime.now()).isoformat(),
    )
    return text


def masked_parts(
    template: str,
    messages: Messages,
    variables: dict[str, str] | None = None,
    now: datetime | None = None,
) -> list[tuple[str, bool]]:
    """Render a conversation and cut its text into parts that the loss counts or not.

    The loss counts each assistant's message, from the end of the generation prompt to the end of
    the message, its end marker included.

    Some templates render an earlier message differently once others follow (Qwen3's drops the
    reasoning). The model would not write such a message, so the loss doesn't count it.

    Args:
        template: the Jinja program.
        messages: see `render`.
        variables: see `render`.
        now: see `render`; the same for all renderings.

    Returns:
        (text, whether the loss counts it), in order. Joined, the texts are ``render(messages)``.
        None is empty.

    Raises:
        Refusal: the template refuses these messages, there is no assistant's message, or the
            template renders the last one differently from its generation prompt.
        UserError: the template can't be parsed, or takes too much time or memory.
    """
    parts = untrusted.ask_child(
        _WHAT,
        "parts",
        template=template,
        messages=messages,
        variables=variables or {},
        now=(now or datetime.now()).isoformat(),
    )
    return [(text, counts) for text, counts in parts]


def _object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file, an empty one if there is no file."""
    return read_json(file) if file.is_file() else {}
