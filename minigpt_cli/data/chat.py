"""Render conversations with a chat template, and find the parts that the loss counts.

A template is a Jinja program that comes with a model's tokenizer. It is data from the Hub, so it
runs in Jinja's sandbox. It gets the variables and functions that transformers gives it.
"""

import json
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt_cli.core.errors import UserError, first_line
from minigpt_cli.data.tokenizer import eos_id, load_tokenizer

if TYPE_CHECKING:
    from jinja2 import Template

Messages = list[dict[str, Any]]

# A chat template (None: there is none), and the special tokens that it may name.
ModelTemplate = tuple[str | None, dict[str, str]]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

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
    try:
        return (folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / CHAT_TEMPLATE} can't be read: {first_line(error)}") from None
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
    _compiled(template)


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
        UserError: the template can't be parsed, or refuses these messages.
    """
    compiled = _compiled(template)
    time = now or datetime.now()
    try:
        return compiled.render(
            {
                **(variables or {}),
                "messages": messages,
                "tools": None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                "strftime_now": lambda form: time.strftime(form),
            }
        )
    except Exception as error:  # a template is a program that can raise anything
        raise UserError(f"the chat template refuses a conversation: {first_line(error)}") from None


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
        now: see `render`.

    Returns:
        (text, whether the loss counts it), in order. Joined, the texts are ``render(messages)``.
        None is empty.

    Raises:
        UserError: there is no assistant's message, or the template renders the last one differently
            from its generation prompt.
    """
    time = now or datetime.now()  # the same for all renderings
    text = render(template, messages, variables=variables, now=time)
    answers = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    if not answers:
        raise UserError("the conversation has no message of the role 'assistant'")
    pieces: list[tuple[str, bool]] = []
    at = 0
    for index in answers:
        try:
            prompt = render(
                template,
                messages[:index],
                add_generation_prompt=True,
                variables=variables,
                now=time,
            )
            until = text
            if index + 1 < len(messages):
                until = render(template, messages[: index + 1], variables=variables, now=time)
        except UserError:  # some templates refuse a conversation without a user's message
            if index == answers[-1]:
                raise
            continue
        start, end = len(prompt), len(until)
        if at <= start < end and until.startswith(prompt) and text.startswith(until):
            pieces += [(text[at:start], False), (text[start:end], True)]
            at = end
        elif index == answers[-1]:
            raise UserError(
                "the chat template renders the last assistant message differently from its "
                "generation prompt, so no loss mask can be built: use another template"
            )
    pieces.append((text[at:], False))
    return [piece for piece in pieces if piece[0]]


@lru_cache(maxsize=8)
def _compiled(template: str) -> "Template":
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Accept ``{% generation %}``, which marks transformers' assistant mask."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            # A block with its own scope, as in transformers
            return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

        def _text(self, caller: Any) -> str:
            return str(caller())

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson  # Jinja's own escapes HTML
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        where = "" if line is None else f" (line {line})"
        raise UserError(
            f"the chat template can't be parsed: {first_line(error)}{where}: correct it, "
            "or use another"
        ) from None


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file, an empty one if there is no file."""
    try:
        content = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file} can't be read: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} can't be read: not a JSON object but {type(content).__name__}")
    return content
